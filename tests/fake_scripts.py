"""What stands in for the four commands of a study, so that a test of hundreds takes seconds.

Given as a launcher: `python fake_scripts.py train_seg.py --out ... `. Every command takes a moment,
notes its start and its end in ran.txt, and does what the real one does for the runner: it resumes,
and leaves the files that the next one reads. A Dice depends on the flags alone.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

CASES = 6
RAN = Path(os.environ.get("FAKE_RAN", "ran.txt"))
RANKS = int(os.environ.get("FAKE_RANKS", "1"))
SLEEP = float(os.environ.get("FAKE_SLEEP", "0.02"))


def main() -> None:
    script, *rest = sys.argv[1:]
    step = Path(script).name
    if step == "eval.py":
        step = rest.pop(0)
    flags = flags_of(rest)
    out = Path(flags["out"])
    out.mkdir(parents=True, exist_ok=True)

    note(f"start {step} {out}")
    lock = os.open(out / "busy", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note(f"clash {step} {out}")
    work(SLEEP, step, out)
    if os.environ.get("FAKE_FAIL") and os.environ["FAKE_FAIL"] in str(out):
        print(f"{step}: --lr: it went wrong")
        sys.exit(2)
    STEPS[step](flags, out)
    note(f"end {step} {out}")


def work(seconds: float, step: str, out: Path) -> None:
    """Sleep; after a signal save for a moment and exit, as the scripts of training do.

    As there, a second SIGINT ends the process before it has saved.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        note(f"signal {signal.Signals(number).name} {step} {out}")
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not asked:
        time.sleep(min(0.02, seconds))
    if asked:
        saved = time.monotonic() + 0.5
        while time.monotonic() < saved:
            time.sleep(0.02)
        note(f"saved {step} {out}")
        sys.exit(0)


def flags_of(words: list[str]) -> dict[str, str]:
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flags[word[2:]] = []
        else:
            flags[list(flags)[-1]].append(word)
    return {name: " ".join(values) for name, values in flags.items()}


def note(line: str) -> None:
    with RAN.open("a") as file:
        file.write(line + "\n")


def pretrain(flags: dict[str, str], out: Path) -> None:
    made = {"method": flags.get("method", "dae"), "seed": flags["seed"]}
    (out / "last.pt").write_text(json.dumps(made))
    write_log(out, [start_event(flags), {"event": "end", "reason": "finished"}])


def finetune(flags: dict[str, str], out: Path) -> None:
    deciding = ("seed", "lr", "label-count", "label-fraction", "fold", "schedule")
    made = json.loads(Path(flags["pretrained"]).read_text())
    made |= {"tuned": {name: flags.get(name, "") for name in deciding}}
    (out / "last.pt").write_text(json.dumps(made))
    events = [
        start_event(flags),
        {"event": "validation", "step": 3, "dice": dice_of(made, "validation"), "cases": 1},
        {"event": "end", "reason": "finished"},
    ]
    write_log(out, events)


def start_event(flags: dict[str, str]) -> dict[str, object]:
    samples = RANKS * int(flags.get("batch-size", "2"))
    batch = {"world": RANKS, "global_batch": samples}
    return {"event": "start", "step": 0, "torch": "fake", "device": "cpu", **batch}


def write_log(out: Path, events: list[dict[str, object]]) -> None:
    (out / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def predict(flags: dict[str, str], out: Path) -> None:
    (out / "weights.json").write_text(Path(flags["checkpoint"]).read_text())


def score(flags: dict[str, str], out: Path) -> None:
    made = json.loads((Path(flags["predictions"]) / "weights.json").read_text())
    names = "case,class,name,status,dice,hd,msd,hd95,nsd,assd,masd,msd_to_truth,msd_to_prediction"
    columns = os.environ.get("FAKE_COLUMNS", names).split(",")
    lines = [",".join(columns)]
    for number in range(CASES):
        case = f"fold{flags.get('fold', '')}case{number}"
        row = {"case": case, "class": 1, "name": "organ", "status": "ok"}
        values = [str(row.get(column, dice_of(made, case))) for column in columns]
        lines.append(",".join(values))
    (out / "scores.csv").write_text("\n".join(lines) + "\n")
    (out / "summary.json").write_text("{}")


def dice_of(made: object, case: str) -> float:
    text = json.dumps([made, case], sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


STEPS = {
    "train_pretrain.py": pretrain,
    "train_seg.py": finetune,
    "predict": predict,
    "score": score,
}

if __name__ == "__main__":
    main()
