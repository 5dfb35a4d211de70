"""What a device needs: the size on disk of a `[cpu]` install, and both demo bundles run in it.

    python benchmarks/base_install.py            (after `make demo`; needs a package index)

The limit is 200 MB for everything in site-packages but pip and setuptools, which a device does not need, installed as
device images are: `pip install --no-compile`. Byte code that a plain `pip install` adds is weighed too and said apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import record

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 200
NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")
FORBIDDEN = ("torch", "onnx", "onnx_ir", "transformers", "diffusers")


SCRIPT = """
import json
from importlib.metadata import distributions
from pathlib import Path
sizes = {}
for dist in distributions():
    files = [Path(dist.locate_file(file)) for file in dist.files or ()]
    sizes[dist.name] = sum(file.stat().st_size for file in files if file.is_file())
print(json.dumps(sizes))
"""


def package_sizes(python: Path) -> dict[str, float]:
    """Megabytes on disk per installed distribution, as its own RECORD lists the files."""
    out = subprocess.run([python, "-c", SCRIPT], check=True, capture_output=True, text=True)
    sizes = {name: round(size / 1e6, 1) for name, size in json.loads(out.stdout).items() if name not in NOT_OURS}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def tree_megabytes(folder: Path) -> float:
    """Everything under site-packages, byte code included, without what the environment brought itself."""
    files = [file for top in folder.iterdir() if not top.name.startswith(NOT_OURS) for file in walk(top)]
    return sum(file.stat().st_size for file in files) / 1e6


def walk(top: Path) -> list[Path]:
    """Regular files at or under a path."""
    return [file for file in ([top] if top.is_file() else top.rglob("*")) if file.is_file() and not file.is_symlink()]


def run_both(edgekit: Path, work: str) -> dict[str, str]:
    """Both demo bundles, run where nothing but the base install can be imported."""
    quiet = {"PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    picture = Path(work) / "apple.png"
    draw = [edgekit, "run", ROOT / "demo/emoji.bundle", "--prompt", "red apple", "-o", picture]
    subprocess.run(draw, check=True, cwd=work, env=quiet)
    assert picture.stat().st_size > 0
    write = [edgekit, "run", ROOT / "demo/pycode.bundle", "--prompt", "import ", "--max-new-tokens", "16"]
    text = subprocess.run(write, check=True, capture_output=True, text=True, cwd=work, env=quiet).stdout
    assert text.strip()
    return {"picture": f"{picture.stat().st_size} bytes", "text": text}


def main() -> None:
    """Install, weigh, run both bundles, weigh again with byte code, record."""
    with tempfile.TemporaryDirectory() as work:
        venv = Path(work) / "venv"
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        python = venv / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", f"{ROOT}[cpu]"], check=True)
        for name in FORBIDDEN:
            probe = subprocess.run([python, "-c", f"import {name}"], capture_output=True, cwd=work)
            assert probe.returncode != 0, f"{name} is installed in the base environment"
        ran = run_both(venv / "bin" / "edgekit", work)
        site = next((venv / "lib").glob("python*/site-packages"))
        total = tree_megabytes(site)
        packages = package_sizes(python)
        subprocess.run([python, "-m", "compileall", "-q", site], check=False, capture_output=True)
        row = {
            "what": "base install [cpu]",
            "megabytes": round(total, 1),
            "limit": LIMIT_MB,
            "megabytes_with_byte_code": round(tree_megabytes(site), 1),
            "packages": packages,
            **ran,
        }
        record("base_install", [row])
        assert total < LIMIT_MB, f"{total:.0f} MB is over {LIMIT_MB} MB"


if __name__ == "__main__":
    main()
