#!/usr/bin/env python3
"""Packs the program with the libraries that it needs into one archive, dist/moba-VERSION-linux-ARCH.tar.gz.

The archive runs where glibc is at least that of this machine. It holds bin/, lib/ (every shared library but glibc's),
share/ (man page, completions) and licenses/. With --check, the archive is unpacked into a fresh folder and used there with
an empty environment; --root DIR does so in that root file system, for example one of debootstrap.
"""

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import help_pages
from flag_tables import MOBA, ROOT

# Parts of glibc, which has to be the system's.
GLIBC = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|mvec)\.so.*)")
# Their code is in the programs themselves.
HEADERS = ("libcli11-dev", "libfmt-dev", "nlohmann-json3-dev")
NAME = f"moba-{help_pages.version()}-linux-{platform.machine()}"


def run(*command, **options):
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def libraries_of(programs):
    """Return {name: path} of the shared libraries that the loader finds for the programs."""
    found = {}
    for program in programs:
        for name, path in re.findall(
            r"^\s*(\S+) => (.*?)(?: \(0x\w+\))?$", run("ldd", program), re.M
        ):
            if path == "not found":
                sys.exit(f"{program}: expected {name} to be installed, got none")
            if not GLIBC.fullmatch(name):
                found[name] = Path(path)
    return found


def package_of(library):
    """Return the Debian package of a file, or None."""
    path = library.resolve()
    for candidate in (library, path, Path(str(path).removeprefix("/usr"))):
        done = subprocess.run(["dpkg-query", "-S", candidate], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.split(":")[0]
    return None


def write_licenses(folder, libraries):
    folder.mkdir()
    packages = {package_of(library) for library in libraries.values()} | set(HEADERS)
    for package in sorted(packages - {None}):
        shutil.copy(Path("/usr/share/doc") / package / "copyright", folder / f"{package}.txt")
    for file in distribution("torch").files:
        if "licenses" in file.parts:
            target = folder / "torch" / Path(*file.parts[file.parts.index("licenses") + 1 :])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)
    if not (folder / "torch").exists():
        sys.exit("torch: expected licences in its package, got none")
    for name in ("Apache-2.0", "GPL-3", "LGPL-2.1", "MPL-1.1"):
        shutil.copy(Path("/usr/share/common-licenses") / name, folder / f"{name}.txt")


def fill(folder):
    programs = [MOBA, MOBA.with_name("moba-llm")]
    libraries = libraries_of(programs)
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    for program in programs:
        copy(program, folder / "bin" / program.name, "$ORIGIN/../lib")
    for name, path in libraries.items():
        copy(path, folder / "lib" / name, "$ORIGIN")
    help_pages.write(folder / "share")
    for name in ("LICENSE", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)
    write_licenses(folder / "licenses", libraries)


def copy(source, target, search):
    """Copy a program or library without its debug symbols; it looks for libraries in `search` first."""
    shutil.copy(source.resolve(), target)
    target.chmod(0o755)
    run("strip", "--strip-unneeded", target)
    run("patchelf", "--force-rpath", "--set-rpath", search, target)


def pack(archive):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / NAME
        fill(folder)
        unpacked = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        archive.parent.mkdir(exist_ok=True)
        run("tar", "--create", "--gzip", "--owner=0", "--group=0", "--numeric-owner", "--sort=name",
            f"--file={archive}", f"--directory={parent}", NAME)  # fmt: skip
    mib = 1 << 20
    print(
        f"{archive.relative_to(ROOT)}: {archive.stat().st_size / mib:.0f} MiB, unpacked {unpacked / mib:.0f} MiB"
    )


# Enters the root file system of the next argument, with /proc, and runs the line after it.
ENTER = ("/usr/bin/unshare", "--mount", "/bin/sh", "-c",
         'mount -t proc proc "$0/proc" && exec /usr/sbin/chroot "$0" /bin/sh -c "$1"')  # fmt: skip
USES = {
    "version": "bin/moba --version",
    "libraries": "bin/moba-llm --version",
    "info": "bin/moba info -m needle-2m",
    "tokenize": "bin/moba tokenize -m needle-2m -p text --json",
    "generate": "bin/moba generate -m needle-2m --no-chat -f README.md -p question -n 4",
    "evaluate": "bin/moba eval needle -m needle-2m --data README.md --lengths 1k --depths 2 --attn moba --png needle.png",
    "train": "bin/moba train --config needle-2m/config.json --tokenizer needle-2m --data README.md --out run --steps 1 --seq-len 256",
    "bench": "bin/moba bench --tokens 1k --chunk-size 128 --topk 2",
}


def use(archive, root):
    """Run the program of the archive with an empty environment, in the root file system `root`."""
    with tempfile.TemporaryDirectory(dir=root / "tmp") as parent:
        run("tar", "--extract", f"--file={archive}", f"--directory={parent}")
        folder = Path(parent) / NAME
        shutil.copytree(ROOT / "models" / "needle-2m", folder / "needle-2m")
        inside = f"/{folder.relative_to(root)}"
        for what, command in USES.items():
            line = f"cd {inside} && {command}"
            command_line = ["/bin/sh", "-c", line] if root == Path("/") else [*ENTER, root, line]
            done = subprocess.run(command_line, env={}, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(
                    f"{root}: {command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
                )
            print(f"{root}: {what} works")
        check_search_path(folder)


def check_search_path(folder):
    """Check that the loader takes no library but glibc from outside of the folder."""
    for program in sorted((folder / "bin").iterdir()):
        for name, path in libraries_of([program]).items():
            if not path.resolve().is_relative_to(folder.resolve()):
                sys.exit(f"{program.name}: expected {name} of the archive, got {path}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="use the archive that is there")
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR")
    options = parser.parse_args()
    archive = ROOT / "dist" / f"{NAME}.tar.gz"
    if options.check:
        use(archive, options.root.resolve())
    else:
        pack(archive)


if __name__ == "__main__":
    main()
