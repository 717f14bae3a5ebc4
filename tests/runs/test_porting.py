"""docs/porting.md: its network and its commands, run as they stand in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

from dae.demo.phantom import write_phantoms
from dae.weights import checkpoint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/porting.md").read_text()
TINY = "--cache-dir cache --crop 16 16 16 --steps 2 --workers 0"
SMALL = {  # what is appended, so that a command takes seconds
    "train_pretrain.py": f"--data runs/demo/phantoms/pretrain.json {TINY}",
    "train_seg.py": f"--data runs/demo/phantoms/ct_seg.json {TINY}",
    "eval.py predict": "--overlap 0 --device cpu",
    "eval.py score": "",
}


def block(language: str) -> str:
    """The page's one block of this language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.M | re.S)
    assert len(blocks) == 1
    return str(blocks[0])


def commands() -> list[tuple[str, str]]:
    """Each command of the page, with the script (and its subcommand) that it calls."""
    found = []
    for line in block("sh").splitlines():
        match = re.match(r"python \$DAE/(eval\.py \w+|\w+\.py) .*", line)
        if match:
            found.append((match[1], match[0]))
    return found


def test_the_page_s_network_pretrains_fine_tunes_predicts_and_is_scored_from_an_empty_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "mynet.py").write_text(block("python"))
    write_phantoms(tmp_path / "runs/demo/phantoms", subjects=1, size=(32, 32, 32))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "DAE": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}

    assert [script for script, _ in commands()] == list(SMALL)
    for script, line in commands():
        done = subprocess.run(
            ["sh", "-c", f"{line} {SMALL[script]}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    plan = checkpoint.load(tmp_path / "runs/demo_seg/best.pt")["plan"]
    assert plan["backbone"] == "mynet:MyNet"
    assert plan["arguments"] == {"feature_size": 16}
    for name in (
        "runs/demo/figures/reconstruction.png",
        "runs/demo_seg/figures/overlay.png",
        "scores/report.html",
    ):
        assert name in PAGE
        assert (tmp_path / name).stat().st_size > 0


def test_the_page_s_network_is_about_forty_lines_and_imports_nothing_of_this_repository() -> None:
    lines = [line for line in block("python").splitlines() if line.strip()]
    assert len(lines) <= 45
    assert "dae" not in block("python")
