#!/bin/sh
# docs/systems.md against the table of systems that the library prints, its generated parts against each other, and the
# manual's system by text alone, which must print what the page says (what is added to moe.h: contract/adding.sh).
# The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
suite=docs
. tests/lib/check.sh

# the library once; scalar kernels give the same bits and compile faster
implement() { # implement HEADER_DIRECTORY
    printf '#define MOE_IMPLEMENTATION\n#include "moe.h"\n' >"$tmp/library.c"
    $cc -std=c99 -O0 -DMOE_NO_SIMD -I"$1" -c "$tmp/library.c" -o "$tmp/library.o"
}
build() { # build NAME HEADER_DIRECTORY: NAME.c, without the implementation, with the library
    grep -v '^#define MOE_IMPLEMENTATION' "$tmp/$1.c" >"$tmp/$1.user.c"
    $cc -std=c99 -O0 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -I"$2" "$tmp/$1.user.c" "$tmp/library.o" \
        -o "$tmp/$1.run" -lm
}
check "the library" implement .

# ---- docs/systems.md ----
cat >"$tmp/rows.c" <<'END'
#include <stdio.h>
#include "moe.h"
int main(void) {
    for (size_t i = 0; i < moe_systems_count(); i++) {
        const moe_system *s = moe_system_at(i);
        printf("## %s\n\n%s. %s [%s].\n\n```text\n%s\n```\n", s->name, s->title, s->source, s->mark, s->choices);
    }
    return 0;
}
END
check "a program that prints the table" build rows .
"$tmp/rows.run" >"$tmp/table"
cat >"$tmp/aliases.c" <<'END'
#include <stdio.h>
#include "moe.h"
int main(void) {
    for (size_t i = 0; moe_system_alias(i); i++) {
        const moe_alias *a = moe_system_alias(i);
        const char *quote = *a->choices ? "`" : "", *blank = *a->choices ? " " : "";
        printf("| %s | %s | %s%s%s%s| %s |\n", a->name, a->system, quote, a->choices, quote, blank, a->mark);
    }
    return 0;
}
END
check "a program that prints the aliases" build aliases .
"$tmp/aliases.run" >"$tmp/aliases"
check "some aliases" [ "$(wc -l <"$tmp/aliases")" -ge 20 ]
sed -n '/^| alias /,/^$/{/^| alias/d;/^| ---/d;/^$/d;s/[^|]*|$//p;}' docs/systems.md >"$tmp/listed"
check "the page has them, in their order, and no other" diff "$tmp/aliases" "$tmp/listed"
# of each section the heading, the line about the source, and the first block
awk '/^## / { on = 1; blocks = 0 } on { print } on && /^```$/ && ++blocks == 1 { on = 0 }' docs/systems.md \
    >"$tmp/sections"
check "some systems" [ "$(grep -c '^## ' "$tmp/table")" -ge 32 ]
check "a section for each row, with its title, source, mark and choices, in the table's order, and no other" \
    diff "$tmp/table" "$tmp/sections"
each() { # each WHAT PATTERN: every section has it exactly once
    check "every section has $1" awk -v pattern="$2" '
        /^## / { if (name && count != 1) { print name ": " count; bad = 1 }; name = $2; count = 0 }
        $0 ~ pattern { count++ }
        END { if (count != 1) { print name ": " count; bad = 1 }; exit bad }' docs/systems.md
}
each "its stages" '^- [*][*]Stages:'
each "what is special here" '^- [*][*]Here:'
each "a measurement" '^Zoo: test loss [0-9]'
sed -n 's/^## //p' docs/systems.md >"$tmp/names"
sed -n 's/^<!-- zoo \(.*\) -->$/\1/p' docs/systems.md >"$tmp/marked"
check "the measurement is of the section's system" diff "$tmp/names" "$tmp/marked"
cp docs/systems.md "$tmp/page.md"
check "the lines are made from the page's own table" env PAGE="$tmp/page.md" sh docs/zoo.sh docs/systems.md
check "and agree with it" diff docs/systems.md "$tmp/page.md"

# ---- the manual's exercise ----
block() { # block NAME N: the N-th block of code after the comment <!-- exercise: NAME -->
    awk -v mark="<!-- exercise: $1 -->" -v want="$2" '
        $0 == mark { seen = 1; next }
        /^<!-- exercise: / { seen = 0 }
        seen && /^```/ { open = !open; if (open) n++; next }
        seen && open && n == want { print }' docs/manual.md
}
block parse 1 >"$tmp/parse"
check "the manual has the block" [ -s "$tmp/parse" ]
prints() { # prints NAME HEADER_DIRECTORY: the block compiles without warnings and prints the block after it
    cp "$tmp/$1" "$tmp/$1.c"
    block "$1" 2 >"$tmp/$1.want"
    build "$1" "$2" && "$tmp/$1.run" >"$tmp/$1.got" && [ -s "$tmp/$1.want" ] && diff "$tmp/$1.want" "$tmp/$1.got"
}
check "a system by text alone" prints parse "$PWD"

finish
