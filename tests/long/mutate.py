#!/usr/bin/env python3
"""Do the tests notice when moe.h is wrong? Changes one thing at a time in the body of a function (an operator, a
constant, a condition, a statement left out, two arguments exchanged), runs the suites with it, scalar kernels, and
reports each change that no suite notices. All changes are compiled into one header, each in a copy of its function that
an environment variable switches on: so each suite is built once.

    tests/long/mutate.py [--count 300] [--seed 1] [--room NAME,...] [--line N] [--jobs 2]
        [--suites NAME,...] [--most SECONDS] [--minutes M]

A change is noticed if a test fails, crashes or does not end, or if the address or undefined-behaviour sanitizer stops
one. Only tests that run the function count: the quick ones of the room's own suites first, then all others, fastest
first; those slower than --most seconds of the processor (default 10) only if they are the room's own, and none over a
minute. A change that does not compile, or that compiles at -O1 to the same code as before, is none. Survivors whose line of code stands in mutants.txt, with why
they change nothing that is promised, are counted apart; so are those in functions that no test enters with scalar
kernels. Factors and terms that change places, and longer arrays, are no changes. Ends with "N changes: ...", status 1 if
a survivor is not explained."""
import argparse, glob, math, os, random, re, shutil, signal, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CC = os.environ.get("CC", "gcc")
FLAGS = ["-std=c99", "-w", "-DMOE_NO_SIMD", "-DTEST_SANITIZED=1", "-Itests/lib"]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# a room's own suites, where they are not named as it is
OWN = {"tape": ["tape", "passes"], "losses": ["losses", "balance"], "balance": ["balance", "losses"],
       "models": ["models", "models_rows", "safetensors"], "systems": ["systems", "systems_rows", "authors"],
       "score": ["score", "passes", "balance"], "gate": ["gate", "passes", "balance"], "run": ["run", "passes"],
       "select": ["select", "passes", "balance"], "experts": ["experts", "passes"], "combine": ["combine", "passes"],
       "kernels": ["kernels", "products"], "layer": ["layer", "save"], "threads": ["threads", "contract/bits"],
       "placement": ["placement", "plan"], "plan": ["plan", "desc", "layer"], "codes": ["codes", "passes"]}


def code_of(text):
    """The text with comments, strings and directives blanked, of the same length."""
    blank = lambda m: re.sub(r"[^\n]", " ", m.group(0))
    return re.sub(r'/\*.*?\*/|//[^\n]*|'
                  r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*', blank,
                  text, flags=re.S | re.M)


def bodies(code):
    """(begin, end) of each function's body: a brace that opens after a parenthesis, outside of any other."""
    depth, begin = 0, None
    for m in re.finditer(r"[{}]", code):
        if m.group() == "{":
            if depth == 0 and re.search(r"\)\s*$", code[max(0, m.start() - 200):m.start()]):
                begin = m.end()
            depth += 1
        else:
            depth -= 1
            if depth == 0 and begin is not None:
                yield begin, m.start()
                begin = None


EXCHANGE = {"<": ["<=", ">"], "<=": ["<", ">"], ">": [">=", "<"], ">=": [">", "<"], "==": ["!="], "!=": ["=="],
            "&&": ["||"], "||": ["&&"], "+": ["-"], "-": ["+"], "*": ["+", "/"], "/": ["*"], "%": ["/"],
            "+=": ["-=", "="], "-=": ["+=", "="], "*=": ["/=", "="], "/=": ["*="], "|=": ["&=", "="], "&=": ["|="],
            "<<": [">>"], ">>": ["<<"], "|": ["&"], "&": ["|"], "^": ["|"]}
LENGTH = re.compile(r"(?:^|[;{}])\s*(?:(?:static|const|unsigned) )*(?:char|int|float|double|size_t|u?int\d+_t|moe_\w+) "
                    r"(?:(?:[^;{}()]|\([^;{}()]*\))*(?:, |\*))?\w+\[$") # before an array's length in its declaration
EITHER = re.compile(r"(?:\bmoe__(?:v_)?(?:min|max|add|mul|fma)|MOE__F_(?:MIN|MAX|ADD|MUL|FMA))\($")
TOKEN = re.compile(r"\s(<<|>>|<=|>=|==|!=|&&|\|\||[-+*/|&]=|[-+*/%<>|&^])\s")


def close(code, at):
    """The place after the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] == "(") - (code[i] == ")")
        if depth == 0:
            return i + 1
    return at + 1


def changes(code, begin, end):
    """(begin, end, new text) of each change that can be made in code[begin:end]."""
    body = code[begin:end]
    found = []
    add = lambda m, group, new: found.append((begin + m.start(group), begin + m.end(group), new))
    for m in TOKEN.finditer(body):
        for new in EXCHANGE[m.group(1)]:
            add(m, 1, new)
    for m in re.finditer(r"(?<![\w.])(\d+)u?(?![\w.])", body):
        if body[m.end()] == "]" and LENGTH.search(body[max(0, m.start() - 300):m.start()]):
            continue # a longer array changes nothing
        add(m, 1, {"0": "1", "1": "2"}.get(m.group(1), str(int(m.group(1)) + 1)))
        if m.group(1) == "1":
            add(m, 1, "0")
    for m in re.finditer(r"(?<![\w.])(\d*\.\d+(?:e[-+]?\d+)?|\d+\.(?:e[-+]?\d+)?|\d+e[-+]?\d+)f?(?!\w)", body):
        add(m, 1, "(%r)" % (float(m.group(1)) * 1.5 if float(m.group(1)) else 0.5))
    for m in re.finditer(r"\b(?:if|while) (\()", body):
        stop = close(body, m.start(1))
        inside = (begin + m.start(1) + 1, begin + stop - 1)
        text = code[inside[0]:inside[1]]
        found.append((*inside, "!(" + text + ")"))
        found.append((*inside, "0 && (" + text + ")"))
    for m in re.finditer(r"(!)(?=[\w(])", body):
        add(m, 1, "")
    for m in re.finditer(r"(?<=[;{})\n] )\s*((?:break|continue|return|[\w>.\[\]*+ -]+ [-+*/|&]?= [^;{}]*|"
                         r"\w+\([^;{}]*\)|"
                         r"[\w>.\[\]-]+(?:\+\+|--)))(?=;)", body):
        statement = m.group(1)
        if not re.match(r"(?:const |static |size_t |u?int\w* |float |double |char |void |moe_\w+ \**\w|struct )",
                        statement):
            add(m, 1, "")
    for m in re.finditer(r"(?<=[(,])\s?([\w.>&*\[\]-]+)(, )([\w.>&*\[\]-]+)(?=[,)])", body):
        if m.group(1) != m.group(3) and not EITHER.search(body[:m.start(1)].rstrip()[-40:]):
            found.append((begin + m.start(1), begin + m.end(3), m.group(3) + ", " + m.group(1)))
    return found


class Suite:
    def __init__(self, name, work):
        self.name, self.file = name, "tests/%s.c" % name
        text = open(self.file).read()
        self.alone = "\n#define MOE_IMPLEMENTATION" in "\n" + text
        self.program = os.path.join(work, name.replace("/", "."))
        self.sanitized = None # the same with sanitizers, or "" if there is none
        self.tests = sorted(set(re.findall(r"\bRUN(?:_IF)?\((?:[^;]*, )?(test_\w+)[,)]", text)))


class Test:
    """One test of a suite, or where these depend on one another all of it."""
    def __init__(self, suite, name, seconds, hits):
        self.suite, self.name, self.seconds, self.hits = suite, name, seconds, hits
        self.clean = None # to the sanitizers, as nothing is changed

    def environment(self):
        return {"TEST_ONLY": self.name} if self.name else {}


class Change:
    def __init__(self, runner, begin, end, new, room):
        self.begin, self.end, self.new, self.room = begin, end, new, room
        text = runner.text
        self.line = text.count("\n", 0, begin) + 1
        first = text.rfind("\n", 0, begin) + 1
        line = text[first:text.find("\n", end)]
        self.old_line = " ".join(line.split())
        self.new_line = " ".join((line[:begin - first] + new + line[end - first:]).split())


def stop_if_idle(process, before=None):
    """Kills what waits for ever: no second of the processor in two minutes, which the limit would never stop."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,time="], capture_output=True, text=True).stdout.splitlines()
    now = sorted(line for line in listed if line.split()[0] == str(process.pid))
    if now and now == before:
        return os.killpg(process.pid, signal.SIGKILL)
    watch(process, 120, now)


def watch(process, seconds, before=None):
    process.watch = threading.Timer(seconds, stop_if_idle, (process, before))
    process.watch.daemon = True
    process.watch.start()


def run(command, limit=900, environment=None, memory="8388608"):
    """(status, what it printed to standard error, seconds); limit and seconds are of the processor, so that other work
    on the machine changes nothing. The status is below 0 where it had to be stopped. At most 8 GB of memory."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(["sh", "-c", 'ulimit -v "$0"; ulimit -t "$1"; shift; exec "$@"', memory,
                                    str(math.ceil(limit)), *command],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
                                   env={**os.environ, **(environment or {})}, start_new_session=True)
        watch(process, 5)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.watch.cancel()
        said.seek(0)
        return process.returncode, said.read().decode(errors="replace"), used.ru_utime + used.ru_stime


SWITCH = """
#include <stdio.h>
#include <stdlib.h>
static int moe__mutant = -1;
static unsigned char moe__mutant_hit[%d];
#define MOE__MUTANT(n) (moe__mutant_hit[n] = 1, moe__mutant == n)
static void __attribute__((constructor)) moe__mutant_begin(void) {
    const char *which = getenv("MOE_MUTANT");
    if (which) moe__mutant = atoi(which);
}
static void __attribute__((destructor)) moe__mutant_end(void) {
    const char *path = getenv("MOE_MUTANT_HITS");
    FILE *f = path ? fopen(path, "wb") : NULL;
    if (f) fwrite(moe__mutant_hit, 1, sizeof moe__mutant_hit, f), fclose(f);
}
"""


class Runner:
    def __init__(self, options):
        self.options = options
        self.work = tempfile.mkdtemp(prefix="mutate.")
        self.text = open("moe.h").read()
        self.code = code_of(self.text)
        names = [f[6:-2] for f in sorted(glob.glob("tests/*.c") + glob.glob("tests/contract/*.c"))]
        self.suites = {n: Suite(n, self.work) for n in names if n != "contract/golden"}
        if options.suites:
            self.suites = {n: s for n, s in self.suites.items() if n in options.suites.split(",")}
        self.tests, self.plain, self.library, self.lock = [], None, None, threading.Lock()
        rooms = rooms_of(self.text)
        self.first = self.text.index("\n", self.text.index("*/", rooms[0][0])) + 1
        self.bodies = [(b + at, e + at) for at, stop, _ in rooms for b, e in bodies(self.code[at:stop])]

    def header(self, where, text):
        os.makedirs(where, exist_ok=True)
        with open(os.path.join(where, "moe.h"), "w") as f:
            f.write(text)

    def with_all(self, changes):
        """The header in which each change waits to be switched on, and the lines of each."""
        out, at, lines, line = [], 0, {}, 1

        def put(text):
            nonlocal line
            out.append(text)
            line += text.count("\n")

        put(self.text[:self.first] + SWITCH % max(1, len(changes)))
        at = self.first
        for begin, end in self.bodies:
            mine = [(n, c) for n, c in enumerate(changes) if c and begin <= c.begin < end]
            if not mine:
                continue
            put(self.text[at:begin])
            for n, c in mine:
                first = line
                put("if (MOE__MUTANT(%d)) {%s%s%s} else " % (n, self.text[begin:c.begin], c.new, self.text[c.end:end]))
                lines[n] = (first, line)
            put("{" + self.text[begin:end] + "}")
            at = end
        put(self.text[at:])
        return "".join(out), lines

    def compile_all(self, changes):
        """The library with all changes in it; those that do not compile are left out, None in the list."""
        where = os.path.join(self.work, "all")
        for _ in range(12):
            text, lines = self.with_all(changes)
            self.header(where, text)
            status, said, _ = run([CC, *FLAGS, "-O1", "-fmax-errors=0", "-I" + where, "-I.", "-c", "tests/lib/moe.c",
                                "-o", os.path.join(self.work, "moe.o")])
            if status == 0:
                return where
            bad = {int(n) for n in re.findall(r"moe\.h:(\d+):\d+: (?:(?:fatal )?error|note: in expansion)", said)}
            out = [n for n, (first, last) in lines.items() if any(first <= b <= last for b in bad)]
            if not out:
                sys.exit("does not compile: " + said[:2000])
            for n in out:
                changes[n] = None
        sys.exit("too many changes do not compile")

    def prepare(self, changes):
        """Each suite built once, with all changes; what each test runs of them, and how long it takes."""
        where = self.compile_all(changes)

        def one(suite):
            library = [] if suite.alone else [os.path.join(self.work, "moe.o")]
            optimise = "-O0" if suite.alone else "-O1"
            status, said, _ = run([CC, *FLAGS, optimise, "-I" + where, "-I.", suite.file, *library, "-o", suite.program,
                                   "-lm"])
            if status:
                return print("left out: %s does not compile: %s" % (suite.name, said[:500]), flush=True)
            tests = [self.trial(suite, name) for name in suite.tests]
            if not tests or not all(tests): # all of it then
                tests = [self.trial(suite, None)]
            for t in tests:
                if not t or t.hits is None:
                    why = "%s takes over a minute" % t.name if t else "fails"
                    print("left out: %s %s" % (suite.name, why), flush=True)
            self.tests += [t for t in tests if t and t.hits is not None]

        with ThreadPoolExecutor(self.options.jobs) as pool:
            list(pool.map(one, self.suites.values()))

    def trial(self, suite, name):
        """A test as nothing is changed; None if it fails, without hits if it takes too long."""
        hits = suite.program + ".hits"
        test = Test(suite, name, 0, None)
        status, _, test.seconds = run([suite.program], 60, {"MOE_MUTANT_HITS": hits, **test.environment()})
        if status < 0:
            return test
        if status:
            return None
        test.hits = {n for n, hit in enumerate(open(hits, "rb").read()) if hit}
        return test

    def same_code(self, change):
        """Is it the same to the compiler?"""
        with self.lock:
            if self.plain is None:
                self.plain = self.plain_object("plain", self.text)
        where = "only%d" % threading.get_ident()
        return self.plain_object(where, self.text[:change.begin] + change.new + self.text[change.end:]) == self.plain

    def plain_object(self, where, text):
        where = os.path.join(self.work, where)
        self.header(where, text)
        status, _, _ = run([CC, *FLAGS, "-O1", "-fmacro-prefix-map=%s=." % where, "-I" + where, "-c", "tests/lib/moe.c",
                            "-o", where + ".o"])
        return open(where + ".o", "rb").read() if status == 0 else None

    def tests_of(self, number, change):
        own = OWN.get(change.room, [change.room])
        can = [t for t in self.tests if number in t.hits and (t.seconds <= self.options.most or t.suite.name in own)]
        return sorted(can, key=lambda t: (t.suite.name not in own or t.seconds > 1, t.seconds))

    def noticed_by(self, number, change):
        for test in self.tests_of(number, change):
            if run([test.suite.program], 4 * test.seconds + 5, {"MOE_MUTANT": str(number), **test.environment()})[0]:
                return test.suite.name
        return None

    def stopped_by(self, number, change):
        for test in self.tests_of(number, change):
            if self.sanitizers_pass(test, None) and not self.sanitizers_pass(test, number):
                return "sanitizers in " + test.suite.name
        return None

    def sanitizers_pass(self, test, number):
        """Does a test pass that is built with the address and undefined-behaviour sanitizers, with a change or none?"""
        suite = test.suite
        with self.lock:
            if suite.sanitized is None:
                suite.sanitized = self.build_sanitized(suite)
        if number is None and test.clean is not None:
            return test.clean
        change = {} if number is None else {"MOE_MUTANT": str(number)}
        passed = suite.sanitized != "" and run([suite.sanitized], 40 * test.seconds + 10,
                                               {**change, **test.environment()}, "unlimited")[0] == 0
        if number is None:
            test.clean = passed
        return passed

    def build_sanitized(self, suite):
        command = [CC, *FLAGS, *SANITIZE, "-I" + os.path.join(self.work, "all"), "-I."]
        if self.library is None:
            self.library = os.path.join(self.work, "sanitized.o")
            run([*command, "-O1", "-c", "tests/lib/moe.c", "-o", self.library])
        program, library = suite.program + ".sanitized", [] if suite.alone else [self.library]
        status, _, _ = run([*command, "-O0", suite.file, *library, "-o", program, "-lm"])
        return "" if status else program


def rooms_of(text):
    marks = [(m.start(), m.group(1)) for m in re.finditer(r"^/\* ==== >>(\w+) =", text, re.M)]
    return [(at, marks[i + 1][0] if i + 1 < len(marks) else len(text), name) for i, (at, name) in enumerate(marks)]


def candidates(runner, options):
    """In random order, a line as likely as any other; each room's share is that of its lines, but at least one."""
    by_room = {}
    for begin, end, room in rooms_of(runner.text):
        if options.room and room not in options.room.split(","):
            continue
        lines = {}
        for b, e in bodies(runner.code[begin:end]):
            for c in changes(runner.code, begin + b, begin + e):
                lines.setdefault(runner.text.count("\n", 0, c[0]) + 1, []).append((*c, room))
        if options.line:
            lines = {n: c for n, c in lines.items() if n == options.line}
        if lines:
            by_room[room] = lines
    order = random.Random(options.seed)
    picks = [(room, n) for room, lines in by_room.items() for n in lines]
    order.shuffle(picks)
    first, seen = [], set()
    for room, n in picks:
        if room not in seen:
            seen.add(room)
            first.append((room, n))
    picks = first + [p for p in picks if p not in set(first)]
    if options.line:
        chosen = [c for room, n in picks for c in by_room[room][n]]
    else:
        chosen = [order.choice(by_room[room][n]) for room, n in picks][:options.count * 5 // 4 + 5]
    return [Change(runner, *c) for c in chosen]


def explained():
    """mutants.txt: "room: the line of code => the changed line :: why", a line each; # begins a comment."""
    path = os.path.join("tests", "long", "mutants.txt")
    known = {}
    for line in open(path) if os.path.exists(path) else []:
        m = re.match(r"(\w+): (.*?) => (.*?) :: (.*)", line)
        if m and not line.startswith("#"):
            known[(m.group(1), m.group(2).strip(), m.group(3).strip())] = m.group(4)
    return known


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=300)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--room", help="one or several, with commas between")
    p.add_argument("--suites", help="these alone, with commas between: quicker, and more survive")
    p.add_argument("--line", type=int, help="every change of this line")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--most", type=float, default=10)
    p.add_argument("--minutes", type=float, default=1e9, help="begin no other change after so long")
    options = p.parse_args()
    os.chdir(ROOT)
    os.makedirs("build", exist_ok=True) # where suites write
    runner = Runner(options)
    counts = {"noticed": 0, "explained": 0, "survived": 0, "unreached": 0, "none": 0}
    known, lock, start = explained(), threading.Lock(), time.time()

    def one(numbered):
        number, change = numbered
        tried = counts["noticed"] + counts["explained"] + counts["survived"]
        if time.time() - start > 60 * options.minutes or tried >= options.count:
            return
        by = runner.noticed_by(number, change)
        reached = any(number in test.hits for test in runner.tests)
        key = (change.room, change.old_line, change.new_line)
        kind = "noticed" if by else "unreached" if not reached else "explained" if key in known else "survived"
        if kind == "survived" and runner.same_code(change):
            kind = "none"
        if kind == "survived":
            by = runner.stopped_by(number, change)
            kind = "noticed" if by else kind
        with lock:
            counts[kind] += 1
            if kind == "survived":
                print("%s: %s => %s :: (line %d)" % (*key, change.line), flush=True)
            elif os.environ.get("MUTATE_VERBOSE"):
                print("%s%s, line %d: %s => %s" % (kind, " by " + by if by else "", change.line, *key[1:]), flush=True)

    try:
        chosen = candidates(runner, options)
        runner.prepare(chosen)
        counts["none"] = chosen.count(None)
        print("prepared in %d s" % (time.time() - start), flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, [(n, c) for n, c in enumerate(chosen) if c]))
    finally:
        shutil.rmtree(runner.work, ignore_errors=True)
    total = counts["noticed"] + counts["explained"] + counts["survived"]
    print("%d changes: %d noticed, %d explained, %d survived (others: %d did not compile or were the same code, %d are "
          "in functions of the instruction sets), %d s" % (total, counts["noticed"], counts["explained"],
                                                           counts["survived"], counts["none"], counts["unreached"],
                                                           time.time() - start))
    return counts["survived"] > 0


if __name__ == "__main__":
    sys.exit(main())
