#include "llm/eval/words.h"

#include <vector>

namespace moba::llm::eval {
namespace {

const std::vector<std::string> kAdjectives{
    "able",    "agile",    "alert",   "amber",   "ample",    "ancient",  "antique",  "arctic",   "arid",
    "autumn",  "azure",    "balmy",   "bitter",  "blank",    "bold",     "brave",    "brief",    "bright",
    "bronze",  "busy",     "calm",    "candid",  "careful",  "cheerful", "chilly",   "civil",    "clean",
    "clear",   "clever",   "cloudy",  "coastal", "cobalt",   "compact",  "copper",   "coral",    "cosmic",
    "cosy",    "crimson",  "crisp",   "crystal", "curious",  "curved",   "dapper",   "daring",   "deep",
    "dense",   "distant",  "double",  "dry",     "dusty",    "eager",    "early",    "earnest",  "eastern",
    "elder",   "electric", "elegant", "emerald", "empty",    "exact",    "faint",    "famous",   "fancy",
    "fertile", "festive",  "fierce",  "final",   "fine",     "firm",     "flat",     "fluent",   "foggy",
    "fond",    "formal",   "fragile", "frank",   "fresh",    "frosty",   "frozen",   "gentle",   "giant",
    "gifted",  "glad",     "glossy",  "golden",  "graceful", "grand",    "grassy",   "great",    "handy",
    "happy",   "hardy",    "hasty",   "heavy",   "hidden",   "hollow",   "honest",   "humble",   "icy",
    "ideal",   "idle",     "indigo",  "inner",   "ivory",    "jade",     "jolly",    "joyful",   "keen",
    "kind",    "large",    "late",    "lavish",  "lazy",     "level",    "light",    "lively",   "local",
    "lonely",  "long",     "loud",    "loyal",   "lucky",    "lunar",    "magenta",  "marble",   "marine",
    "mellow",  "merry",    "mighty",  "mild",    "minor",    "misty",    "modern",   "modest",   "mossy",
    "narrow",  "neat",     "new",     "nimble",  "noble",    "northern", "novel",    "oaken",    "odd",
    "olive",   "opal",     "open",    "orange",  "outer",    "pale",     "patient",  "peaceful", "pearly",
    "plain",   "playful",  "polar",   "polite",  "prime",    "proud",    "purple",   "quick",    "quiet",
    "rapid",   "rare",     "ready",   "regal",   "rich",     "ripe",     "robust",   "rosy",     "round",
    "royal",   "ruby",     "rural",   "rustic",  "rusty",    "salty",    "sandy",    "scarlet",  "scenic",
    "secret",  "serene",   "shady",   "sharp",   "shiny",    "silent",   "silver",   "simple",   "sleepy",
    "slender", "slow",     "small",   "smooth",  "snowy",    "soft",     "solar",    "solid",    "southern",
    "spare",   "spicy",    "spry",    "stable",  "steady",   "steep",    "still",    "stormy",   "stout",
    "strong",  "sturdy",   "subtle",  "sunny",   "swift",    "tall",     "tame",     "tawny",    "tender",
    "thick",   "thin",     "thirsty", "tidy",    "timely",   "tiny",     "tranquil", "true",     "twin",
    "unique",  "upper",    "urban",   "useful",  "vacant",   "vast",     "velvet",   "violet",   "vivid",
    "warm",    "wary",     "western", "wild",    "windy",    "wise",     "witty",    "wooden",   "young",
    "zealous"};

const std::vector<std::string> kNouns{
    "acorn",   "anchor",   "anvil",   "apple",    "apron",    "arch",    "arrow",   "attic",    "badge",
    "badger",  "bakery",   "balcony", "bamboo",   "banner",   "barn",    "barrel",  "basin",    "basket",
    "bay",     "beach",    "beacon",  "beetle",   "bell",     "bench",   "berry",   "bicycle",  "birch",
    "bison",   "blanket",  "boat",    "bonfire",  "book",     "boulder", "bowl",    "branch",   "bridge",
    "brook",   "bucket",   "button",  "cabin",    "cactus",   "camel",   "canal",   "candle",   "canoe",
    "canvas",  "canyon",   "carpet",  "castle",   "cave",     "cedar",   "cellar",  "chapel",   "cherry",
    "chest",   "chimney",  "cliff",   "clock",    "cloud",    "coin",    "comet",   "compass",  "condor",
    "cottage", "cradle",   "crane",   "creek",    "cricket",  "crown",   "curtain", "dagger",   "daisy",
    "deer",    "desert",   "dolphin", "door",     "dragon",   "drum",    "eagle",   "elbow",    "ember",
    "engine",  "falcon",   "farm",    "feather",  "fern",     "ferry",   "fiddle",  "field",    "finch",
    "flag",    "flute",    "forest",  "fork",     "fountain", "fox",     "gander",  "garden",   "gate",
    "glacier", "globe",    "goblet",  "goose",    "granite",  "grove",   "guitar",  "hammer",   "harbor",
    "harp",    "hat",      "hawk",    "hedge",    "heron",    "hill",    "honey",   "horse",    "hut",
    "island",  "ivy",      "jacket",  "jaguar",   "jar",      "jewel",   "kettle",  "key",      "kite",
    "kitten",  "ladder",   "lake",    "lamp",     "lantern",  "lark",    "leaf",    "lemon",    "lily",
    "lion",    "lizard",   "locket",  "loom",     "lute",     "magnet",  "mango",   "map",      "maple",
    "market",  "mask",     "meadow",  "melon",    "mill",     "mirror",  "mitten",  "monk",     "moose",
    "moth",    "mountain", "museum",  "napkin",   "needle",   "nest",    "nickel",  "notebook", "oak",
    "oasis",   "ocean",    "onion",   "orchard",  "otter",    "oven",    "owl",     "paddle",   "palace",
    "panther", "parrot",   "peach",   "pear",     "pebble",   "pencil",  "pepper",  "piano",    "pigeon",
    "pillow",  "pine",     "planet",  "plum",     "pocket",   "pond",    "pony",    "poppy",    "porch",
    "prairie", "puzzle",   "quarry",  "quilt",    "rabbit",   "raft",    "railway", "raven",    "reef",
    "ribbon",  "river",    "road",    "robin",    "rocket",   "roof",    "rope",    "saddle",   "sailor",
    "salmon",  "sandal",   "scarf",   "school",   "shadow",   "sheep",   "shell",   "ship",     "shoe",
    "shovel",  "sleigh",   "spade",   "sparrow",  "spider",   "spoon",   "spruce",  "squirrel", "stable",
    "star",    "statue",   "stone",   "stove",    "summit",   "swan",    "table",   "tailor",   "teapot",
    "temple",  "tent",     "thistle", "ticket",   "tiger",    "torch",   "tower",   "trail",    "trumpet",
    "tulip",   "tunnel",   "turtle",  "umbrella", "valley",   "vase",    "viking",  "village",  "vine",
    "violin",  "wagon",    "walnut",  "water",    "well",     "whale",   "wheel",   "whistle",  "willow",
    "window",  "wolf",     "yacht",   "yarn",     "zebra"};

}  // namespace

std::string random_name(Random& random) {
  const std::string& adjective = random.one_of(kAdjectives);
  return adjective + "-" + random.one_of(kNouns);
}

}  // namespace moba::llm::eval
