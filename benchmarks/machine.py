"""Properties of this machine and memory of this process, as Linux reports them."""

import os
import platform
import re
from pathlib import Path


def cpu_field(name):
    """Return the first value of a field of /proc/cpuinfo, or an empty string."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return ""


def cpu_name():
    return cpu_field("model name") or platform.processor() or platform.machine()


def machine_name():
    """Return the CPU's name and number of cores as a part of file names."""
    words = re.sub(r"\((r|tm)\)|cpu|processor|@.*", " ", cpu_name().lower())
    return "-".join(re.findall(r"[a-z0-9]+", words)) + f"-{os.cpu_count()}-cores"


def peak_rss_bytes(process="self"):
    """Return the peak memory of a process. That of getrusage would include the parent's at the fork."""
    return int(Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
