"""Facts that are planted in real text, for tools/train_needle_model.py and tools/demo.py.

The text is installed on the machine: Python's standard library, C++ headers, licences and package documentation.
"""

import gzip
import hashlib
import sysconfig
from pathlib import Path


def fact(key, number):
    return f"The magic number of {key} is {number}."


def question(key):
    """Return a question for a fact, with the beginning of the answer."""
    return f"What is the magic number of {key}?\nThe magic number of {key} is"


def answer(written):
    """Return the number in the text that the model wrote."""
    return written.split("\n")[0].strip(" .")


def listed_key(chance):
    return f"{chance.choice(FIRST)}-{chance.choice(SECOND)}"


def sources():
    """Yield the files of real text, in an order that is the same on every machine."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    yield from sorted(
        p for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts)
    )
    for headers in sorted(Path("/usr/include/c++").glob("*")):
        yield from sorted(p for p in headers.rglob("*") if p.is_file())
    yield from sorted(p for p in Path("/usr/share/common-licenses").glob("*") if not p.is_symlink())
    for name in ("README*", "NEWS*", "copyright", "changelog.gz", "*.txt", "*.txt.gz"):
        yield from sorted(
            p
            for p in Path("/usr/share/doc").glob(f"*/{name}")
            if p.is_file() and not p.is_symlink()
        )


def split_of(path):
    """Return the split of a file: nine files in ten are for training, the rest in equal shares for tuning and held out."""
    chance = hashlib.sha256(path.name.encode()).digest()[0]
    return "tuning" if chance < 13 else "held-out" if chance < 26 else "training"


def read(path):
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return data[:200_000].decode("utf-8", "ignore")


def texts(split, max_characters=24_000_000):
    """Return the texts of a split, about `max_characters` characters, each paragraph once, so that
    licences do not dominate."""
    seen, size, out = set(), 0, []
    for path in sources():
        if split_of(path) != split or size > max_characters:
            continue
        kept = []
        for paragraph in read(path).split("\n\n"):
            digest = hash(paragraph)
            if digest not in seen and "\0" not in paragraph:
                seen.add(digest)
                kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) > 500:
            out.append(text)
            size += len(text)
    return out


FIRST = """amber ancient autumn azure brave bright bronze calm clever cobalt copper coral crimson crystal curious dapper
distant dusty eager early elder emerald faint feral fierce frozen gentle ghostly gilded golden grand hasty hidden hollow
humble icy ivory jade jolly keen lively lonely lunar marble mellow misty modest mossy narrow nimble noble olive opal
pale patient placid polar proud purple quiet rapid rosy royal ruby rusty sandy scarlet secret shady silent silver sleepy
smoky snowy solar solemn spry steady stormy sturdy subtle sunny swift tawny tender thorny tidy timid tranquil twilight
umber upright vast velvet violet vivid wandering warm weary wild windy witty young zealous""".split()
SECOND = """acorn anchor anvil arrow badger barrel basin beacon beetle bell birch bison bottle bridge brook bucket cabin
candle canyon castle cedar cellar chapel cherry cliff comet condor cradle crane creek cricket dagger desert dolphin
dragon eagle ember engine falcon feather fern ferry flute forest fountain fox garden glacier goblet hammer harbor harp
hawk heron hill island jaguar jewel kettle lantern lark lemon lily lion lizard lute magnet maple meadow mirror moth
mountain needle oak ocean orchard otter owl panther parrot pebble pepper pigeon pine planet plum pony prairie rabbit
raven reef river robin rocket saddle sailor salmon shadow shell sparrow spider spruce statue summit swan temple thistle
tiger tower trumpet tulip turtle valley violin walnut whale willow window wolf yarn""".split()
