"""What a run says: log.jsonl for machines, a progress line and a few sentences for people.

log.jsonl has one JSON object per line. A killed run may leave a torn last line, and a resumed one repeats the steps
since the last checkpoint: `read` drops the first and keeps the last of the second.
"""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from dae.config.pretrain import PretrainConfig
from dae.config.shared import RunConfig
from dae.errors import InputError


class Log:
    """Appends events to log.jsonl, and shows progress, on rank 0; says nothing on the others."""

    def __init__(self, path: Path, *, steps: int, start: int, main: bool) -> None:
        self.path, self.main = path, main
        self.bar: Any = None
        if main:
            if path.exists() and (tail := path.read_bytes()[-1:]) and tail != b"\n":
                self._append("\n")  # what a killed run left half-written stays a line of its own
            self.bar = tqdm(
                total=steps,
                initial=start,
                unit="step",
                disable=not sys.stderr.isatty(),
                smoothing=0.1,
            )

    def event(self, event: str, **facts: Any) -> None:
        """One line of log.jsonl. NaN and infinity, which JSON does not have, become null."""
        if self.main:
            self._append(json.dumps({"event": event, **finite(facts)}, allow_nan=False) + "\n")

    def say(self, text: str) -> None:
        """A line for the reader, above the progress line."""
        if self.main:
            self.bar.write(text, file=sys.stderr)

    def warn(self, step: int, text: str) -> None:
        """In the log, and for the reader."""
        self.event("warning", step=step, text=text)
        self.say(text)

    def progress(self, step: int, text: str) -> None:
        """Move the bar; where there is no terminal, print the line instead."""
        if not self.main:
            return
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"step {step}/{self.bar.total}: {text}", file=sys.stderr, flush=True)

    def stop_before_the_step(self, step: int, loss: float, grad_norm: float) -> NoReturn:
        """A loss or gradient that is not finite. All ranks come here together: they compare the same numbers."""
        self.event("end", step=step, reason="not finite", loss=loss, grad_norm=grad_norm)
        saved = self.path.with_name("last.pt")
        left = (
            f"{saved} is from before it" if saved.exists() else "no checkpoint had been saved yet"
        )
        raise InputError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; stopped before the step, {left}; "
            "try --amp off or a lower --lr"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _append(self, text: str) -> None:
        try:
            with self.path.open("a") as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"{self.path}: could not be written ({error.strerror})") from error


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[dict[str, Any]]:
    """Events of a log.jsonl: for each kind and step the last one, torn lines left out."""
    events: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines()):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        repeats = event["event"] in ("train", "validation")
        events[(event["event"], event["step"]) if repeats else number] = event
    return list(events.values())


def versions() -> dict[str, Any]:
    """What the run ran on, for the first line of the log."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": commit_of(Path(__file__).resolve().parents[2]),
        "command": sys.argv,
    }


def commit_of(root: Path) -> str | None:
    """The commit of a project whose own repository `root` is.

    None where there is no repository, and where `root` lies within another one: an installed package is
    not at the commit of the project that it is installed in.
    """
    asked = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # a machine without git
        return None
    found = done.stdout.splitlines()
    if done.returncode or len(found) != 2 or Path(found[0]).resolve() != root.resolve():
        return None
    return found[1]


def greeting(config: PretrainConfig, facts: Mapping[str, Any]) -> str:
    """What starts, in one line."""
    where = f"{facts['world']} x {facts['device']}" if facts["world"] > 1 else facts["device"]
    begins = f"from step {facts['step']}" if facts["step"] else "from the start"
    note = " (nothing to resume yet)" if config.resume and not facts["step"] else ""
    if facts["warmup"] < config.warmup:
        note += f"; --warmup {config.warmup} cut to {facts['warmup']}, a tenth of the run"
    return (
        f"{config.method} on {facts['volumes']} volumes ({', '.join(facts['modalities'])}), "
        f"{facts['parameters'] / 1e6:.1f} M parameters, batch {facts['global_batch']} on {where}, {begins}{note}"
    )


def in_words(validation: Mapping[str, Any]) -> str:
    """The result of a validation in one line."""
    if not validation:
        return "nothing left to do"
    text = f"validation L1 {validation['l1']:.4f}"
    if validation["l1_input"]:
        share = validation["l1"] / validation["l1_input"]
        text += f", {share:.3f} of doing nothing (L1(x_hat, x) = {validation['l1_input']:.4f})"
    each = validation["l1_by_modality"], validation["l1_input_by_modality"]
    return (
        text
        + "; "
        + ", ".join(f"{kind} {l1:.4f}/{each[1][kind]:.4f}" for kind, l1 in each[0].items())
    )


def dice_in_words(validation: Mapping[str, Any]) -> str:
    if not validation:
        return "nothing left to do"
    each = ", ".join(f"{name} {dice:.3f}" for name, dice in validation["dice_by_class"].items())
    plural = "s" * (validation["cases"] != 1)
    return f"validation Dice {validation['dice']:.4f} over {validation['cases']} volume{plural}; {each}"


def nothing_to_contrast(config: PretrainConfig, samples: int, modalities: Collection[str]) -> str:
    """In one line why CMCL cannot work in this run, or nothing.

    samples: how many it compares with each other.
    """
    if not config.alpha:
        return ""
    if samples == 1:
        return (
            "warning: CMCL has nothing to compare: there is one sample in a micro-batch, so its loss is a constant "
            "and its gradient 0; take --batch-size 2 (--checkpointing saves memory), or --alpha 0 to leave it out"
        )
    if len(modalities) == 1:
        return (
            f"warning: CMCL has nothing to tell apart: every training volume is {min(modalities)}, so it only pulls "
            "all features together; --alpha 0 leaves it out"
        )
    return ""


def last_words(validation: Mapping[str, Any], config: PretrainConfig, *, step: int) -> str:
    if step < config.steps:
        return stopped(config, step, config.steps)
    return f"{in_words(validation)}; see {Path(config.out) / 'figures' / 'reconstruction.png'}"


def stopped(config: RunConfig, step: int, steps: int) -> str:
    """A run that has not come to its end."""
    if 0 < config.stop_after <= step:
        asked = f"--stop-after {config.stop_after}"
        return f"stopped after step {step} of {steps}, as {asked} says; --resume without it goes on"
    return f"stopped after step {step} of {steps}; the same command with --resume goes on"


def not_beating_its_input(validation: Mapping[str, Any], config: PretrainConfig) -> str:
    reason = (
        "with --recon plain the decoder's instance norms erase a crop's intensity: try --recon residual or scaled"
        if config.recon == "plain"
        else "train longer, or try another --lr"
    )
    return (
        f"warning: the network does not beat its own input: validation L1 {validation['l1']:.4f}, doing nothing "
        f"L1(x_hat, x) {validation['l1_input']:.4f}; {reason}"
    )


def time_left(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{seconds:.0f} s"
        if minutes < 2
        else f"{minutes:.0f} min"
        if hours < 2
        else f"{hours:.1f} h"
    )
