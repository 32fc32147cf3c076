"""How many workers this machine, or this container, has processors for.

Strategy: `auto` is the CPU affinity capped by the floor of the tightest CPU quota on the way from our cgroup up to the
root, for cgroup v2 (cpu.max) and v1 (cpu.cfs_quota_us) alike. The host's core count is never used: a gateway that starts
128 workers in a 2-CPU container is throttled by the scheduler and killed for its memory.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_cpus(proc: Path = Path("/proc/self")) -> int:
    """Return the number of workers that `workers: auto` stands for; at least 1."""
    affinity = len(os.sched_getaffinity(0))
    quota = cpu_quota(proc)
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """Return the tightest CPU quota of our cgroups, in CPUs, or None when there is none."""
    quotas = []
    for directory, version in _directories(proc):
        quota = _quota_v2(directory) if version == 2 else _quota_v1(directory)
        if quota is not None:
            quotas.append(quota)
    return min(quotas, default=None)


def _quota_v2(directory: Path) -> float | None:
    words = _read(directory / "cpu.max").split()
    if not words or words[0] == "max":
        return None
    return _ratio(words[0], words[1] if len(words) > 1 else "100000")


def _quota_v1(directory: Path) -> float | None:
    return _ratio(_read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    try:
        numerator, denominator = int(quota), int(period)
    except ValueError:
        return None
    return numerator / denominator if numerator > 0 and denominator > 0 else None


def _directories(proc: Path) -> Iterator[tuple[Path, int]]:
    """Yield (directory, cgroup version) from our own cgroup up to the root of each mounted hierarchy."""
    mounts = _mounts(proc)
    for line in _read(proc / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and "cpu" not in controllers.split(","):
            continue
        if version in mounts:
            root, mount = mounts[version]
            yield from ((directory, version) for directory in _upwards(root, mount, path))


def _upwards(root: str, mount: Path, path: str) -> Iterator[Path]:
    """Yield the directories of cgroup `path`; one outside the mounted subtree counts as the mount itself."""
    inside = PurePosixPath(path)
    if inside.is_relative_to(root):
        inside = inside.relative_to(root)
    directory = mount.joinpath(*(part for part in inside.parts if part not in ("/", "..")))
    while directory != mount:
        yield directory
        directory = directory.parent
    yield mount


def _mounts(proc: Path) -> dict[int, tuple[str, Path]]:
    """Return {cgroup version: (root inside the hierarchy, mount point)} out of mountinfo (proc(5))."""
    found: dict[int, tuple[str, Path]] = {}
    for line in _read(proc / "mountinfo").splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            found[2] = (fields[3], Path(fields[4]))
        elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            found[1] = (fields[3], Path(fields[4]))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
