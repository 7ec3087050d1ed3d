#!/usr/bin/env python3
"""How much of moe.h the suites run: `make coverage` (docs/testing.md).

Builds the library and every suite with clang 19's source coverage and MC/DC, runs the suites as `make test` runs them,
and prints one table by room. What counts: what the compiler sees of moe.h on this machine, the scalar kernels and those
of its instruction sets; what is compiled several times (a kernel for each instruction set, the suites that have the
library in themselves) counts once, as covered by any of them.

  --show ROOM[,ROOM] | all   after the table: what no test reaches, each with its line
  --suites NAME[,NAME]       these alone (save, contract/memory)
  --jobs N                   suites at one time (default 1)
  --work DIR                 keep programs and profiles there; a suite that is there and newer is not run again
  --loaders PERCENT, --branches PERCENT   exit with 1 if the loaders' MC/DC or the header's branches are below

CPPFLAGS=-DMOE_NO_SIMD measures the scalar kernels alone, in a quarter of the time.

What cannot be reached stands in tests/unreached.txt, each with its reason. It stays in the count: the last column says
how many of the branches and conditions that are missing have one. What MOE_ASSERT states is no branch: it holds."""
import argparse
import concurrent.futures
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

LOADERS = ["json", "text", "safetensors", "npy", "models", "save"]
# no suites; and balance trains for minutes, calling nothing that other suites do not
NO_SUITE = ["contract/golden", "examples/inspect_files", "examples/npy_near", "balance"]
FLAGS = ["-std=c99", "-O1", "-g0", "-w", "-ffp-contract=off", "-pthread", "-I.", "-Itests/lib"]
COVERAGE = ["-fprofile-instr-generate", "-fcoverage-mapping", "-fcoverage-mcdc"]
ONE_NAME = ["-Xclang", "-main-file-name", "-Xclang", "moe.c"]  # a static function is the same one in each suite
TOOLS = {"cc": "clang-19", "profdata": "llvm-profdata-19", "cov": "llvm-cov-19"}


def rooms_of(lines):
    """The room of each line; "" before the first."""
    room, result = "", [""]
    for line in lines:
        banner = re.match(r"/\* ==== >>(\w+) =", line)
        room = banner.group(1) if banner else room
        result.append(room)
    return result


def explained_of(path, lines):
    """(line, reason) of tests/unreached.txt: FUNCTION | TEXT IN A LINE OF IT | REASON."""
    found = {}
    function = ""
    where = {}
    for number, line in enumerate(lines, 1):
        head = re.match(r"(?:static|MOE_API)\b.*?\b(\w+)\(", line)
        function = head.group(1) if head else function
        where.setdefault(function, []).append((number, line))
    for entry in open(path):
        if entry.startswith("#") or not entry.strip():
            continue
        name, text, reason = (part.strip() for part in entry.split(" | "))
        hits = [n for n, line in where.get(name, []) if text in line]
        if not hits:
            print("tests/unreached.txt: no such line: %s | %s" % (name, text))
        for number in hits:
            found[number] = reason
    return found


class Build:
    """Programs of the suites, run once each; what they covered as sets of (place, covered?)."""
    def __init__(self, options):
        self.options = options
        self.work = options.work or tempfile.mkdtemp(prefix="coverage.")
        os.makedirs(self.work, exist_ok=True)

    def at(self, name):
        return os.path.join(self.work, name.replace("/", "."))

    def compile(self, source, to, flags):
        flags = FLAGS + COVERAGE + ONE_NAME + os.environ.get("CPPFLAGS", "").split() + flags
        result = subprocess.run([TOOLS["cc"], *flags, source, "-o", to, "-lm"], capture_output=True, text=True)
        if result.returncode:
            sys.exit("%s: %s" % (source, result.stderr[:2000]))

    def fresh(self, to):
        newest = max(os.path.getmtime(f) for f in ["moe.h", *glob.glob("tests/lib/*")])
        return os.path.exists(to) and os.path.getmtime(to) > newest

    @staticmethod
    def alone(name):
        return "\n#define MOE_IMPLEMENTATION" in "\n" + open("tests/%s.c" % name).read()

    def suite(self, name):
        source, program = "tests/%s.c" % name, self.at(name)
        alone = self.alone(name)
        if self.fresh(program) and os.path.getmtime(program) > os.path.getmtime(source) and self.raw(name):
            return
        for f in self.raw(name):
            os.remove(f)
        self.compile(source, program, ["-O0"] if alone else [self.at("moe.o")])
        environment = {**os.environ, "LLVM_PROFILE_FILE": self.at(name) + "-%p.profraw"}
        run = subprocess.run([program], capture_output=True, text=True, env=environment)
        last = (run.stdout.strip().splitlines() or ["nothing"])[-1]
        if run.returncode:
            print("%s: %s (status %d)" % (name, last, run.returncode), flush=True)

    def all(self, names):
        if not self.fresh(self.at("moe.o")):
            self.compile("tests/lib/moe.c", self.at("moe.o"), ["-c"])
        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            for number, _ in enumerate(pool.map(self.suite, sorted(names, key=self.alone)), 1): # the quick ones first
                print("\r%d of %d suites" % (number, len(names)), end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    def raw(self, name):
        return glob.glob(glob.escape(self.at(name)) + "-*.profraw")

    def measure(self, names, found):
        merged = self.at("all.profdata")
        listed = self.at("profiles")
        with open(listed, "w") as f:
            f.write("\n".join(p for n in names for p in self.raw(n)))
        subprocess.run([TOOLS["profdata"], "merge", "-sparse", "-f", listed, "-o", merged], check=True)
        linked = [n for n in names if not self.alone(n)][:1] # the library in one is the library in all
        for name in linked + [n for n in names if self.alone(n)]:
            out = subprocess.run([TOOLS["cov"], "export", "-format=text", self.at(name), "-instr-profile", merged,
                                  "-sources", os.path.abspath("moe.h")], capture_output=True)
            if out.returncode:
                sys.exit("%s: %s" % (name, out.stderr.decode()[:2000]))
            self.read(json.loads(out.stdout)["data"][0], found)

    @staticmethod
    def read(data, found):
        def here(f, number):
            return os.path.basename(f["filenames"][number]) == "moe.h"
        for f in data["files"]:
            if os.path.basename(f["filename"]) == "moe.h":
                Build.lines(f["segments"], found)
        for f in data["functions"]:
            first = f["regions"][0]
            if not here(f, first[5]):
                continue
            found.add("functions", (first[0], 0, ""), f["count"] > 0)
            for b in f["branches"]:
                if here(f, b[6]):
                    for way, count in (("true", b[4]), ("false", b[5])):
                        found.add("branches", (b[0], b[1], way), count > 0)
            for m in f.get("mcdc_records", []):
                for number, covered in enumerate(m[-1]):
                    found.add("MC/DC", (m[0], m[1], "condition %d" % (number + 1)), covered)

    @staticmethod
    def lines(segments, found):
        """As llvm-cov counts a line: the largest of what goes on from the line before, and what begins on it."""
        by_line = {}
        for s in segments:
            by_line.setdefault(s[0], []).append(s)
        wrapped = None
        for line in range(segments[0][0], segments[-1][0] + 1) if segments else []:
            here = by_line.get(line, [])
            starts = [s for s in here if s[3] and s[4] and not s[5]]
            skipped = here and not here[0][3] and here[0][4]
            counted = not skipped and (starts or (wrapped and wrapped[3]))
            if counted:
                counts = [s[2] for s in starts] + ([wrapped[2]] if wrapped and wrapped[3] else [])
                found.add("lines", (line, 0, ""), max(counts) > 0)
            wrapped = here[-1] if here else wrapped


class Found:
    def __init__(self):
        self.seen = {"lines": {}, "functions": {}, "branches": {}, "MC/DC": {}}

    def add(self, what, place, covered):
        self.seen[what][place] = self.seen[what].get(place, False) or covered

    def without(self, lines, text):
        for what in ("branches", "MC/DC"):
            places = self.seen[what].items()
            self.seen[what] = {place: covered for place, covered in places if text not in lines[place[0] - 1]}


def table(found, room_at, explained):
    names = [r for r in dict.fromkeys(room_at)]
    names += ["loaders", "moe.h"]
    print("%-13s" % "room" + "".join("%20s" % what for what in found.seen) + "%11s" % "explained")
    percent = {}
    for room in names:
        def mine(line):
            return room == "moe.h" or room_at[line] == room or (room == "loaders" and room_at[line] in LOADERS)
        row, why = "%-13s" % (room or "declarations"), 0
        for what, places in found.seen.items():
            here = [(place, covered) for place, covered in places.items() if mine(place[0])]
            n, good = len(here), sum(covered for _, covered in here)
            percent[room, what] = 100 * good / n if n else 100
            row += "%20s" % ("%.1f%% %d/%d" % (percent[room, what], good, n) if n else "-")
            if what in ("branches", "MC/DC"):
                why += sum(not covered and place[0] in explained for place, covered in here)
        if "/" in row:
            print(row + "%11d" % why)
    return percent


def show(found, rooms, room_at, explained, lines):
    for what, places in found.seen.items():
        for place, covered in sorted(places.items()):
            line, column, more = place
            if covered or (what == "lines") or (rooms != ["all"] and room_at[line] not in rooms):
                continue
            text = lines[line - 1][max(column - 1, 0):].strip()
            reason = "  [" + explained[line] + "]" if line in explained else ""
            print("%s %d:%d %s: %s%s" % (what, line, column, more, text[:90], reason))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", default="")
    parser.add_argument("--suites", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", default="")
    parser.add_argument("--loaders", type=float, default=0)
    parser.add_argument("--branches", type=float, default=0)
    options = parser.parse_args()
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    missing = [name for name in TOOLS.values() if not shutil.which(name)]
    if missing:
        sys.exit("needs %s: clang-19, llvm-19 and libclang-rt-19-dev of Debian" % ", ".join(missing))
    build = Build(options)
    every = [f[6:-2] for d in ("", "contract/", "examples/") for f in sorted(glob.glob("tests/%s*.c" % d))]
    names = options.suites.split(",") if options.suites else [n for n in every if n not in NO_SUITE]
    lines = open("moe.h").read().splitlines()
    room_at, explained = rooms_of(lines), explained_of("tests/unreached.txt", lines)
    found = Found()
    build.all(names)
    build.measure(names, found)
    found.without(lines, "MOE_ASSERT(")
    print("%d suites, clang's source coverage and MC/DC" % len(names))
    percent = table(found, room_at, explained)
    if options.show:
        show(found, options.show.split(","), room_at, explained, lines)
    if not options.work:
        shutil.rmtree(build.work)
    if percent["loaders", "MC/DC"] < options.loaders or percent["moe.h", "branches"] < options.branches:
        sys.exit(1)


if __name__ == "__main__":
    main()
