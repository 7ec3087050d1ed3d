/* A peer that is a program of its own: it takes a command a line, a word and two numbers, and answers with a number. */
#ifndef BENCH_PEER_PROCESS_H
#define BENCH_PEER_PROCESS_H

#include "common.h"
#include <fcntl.h>
#include <sys/wait.h>

typedef struct peer_process {
    pid_t child; /* 0: there is none */
    FILE *to, *from;
} peer_process;

/* Negative: the process has ended. */
static inline double peer_ask(peer_process *p, const char *command, size_t a, size_t b)
{
    double v;
    if (fprintf(p->to, "%s %zu %zu\n", command, a, b) < 0 || fflush(p->to) != 0) return -1;
    return fscanf(p->from, "%lf", &v) == 1 ? v : -1;
}

static inline void peer_stop(peer_process *p)
{
    if (p->to) fclose(p->to);
    if (p->from) fclose(p->from);
    if (p->child > 0) waitpid(p->child, NULL, 0);
    memset(p, 0, sizeof *p);
}

/* args: the program, a script, its arguments, NULL. */
static inline void peer_start(peer_process *p, char **args)
{
    int in[2], out[2];
    fflush(NULL);
    if (pipe(in) != 0 || pipe(out) != 0) bench_die("no pipe for %s", args[1]);
    fcntl(in[1], F_SETFD, FD_CLOEXEC); /* or the next peer would hold it open, and this one see no end */
    fcntl(out[0], F_SETFD, FD_CLOEXEC);
    p->child = fork();
    if (p->child == 0) {
        dup2(in[0], STDIN_FILENO);
        dup2(out[1], STDOUT_FILENO);
        close(in[0]), close(in[1]), close(out[0]), close(out[1]);
        /* malloc keeps what it has, in huge pages: new pages for each gradient would cost more than computing it */
        setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=34359738368:"
                                 "glibc.malloc.trim_threshold=34359738368", 1);
        if (strstr(args[0], "python") && getenv("PYTHON")) args[0] = getenv("PYTHON"); /* default: Debian's */
        execvp(args[0], args);
        _exit(127);
    }
    close(in[0]), close(out[1]);
    p->to = fdopen(in[1], "w"), p->from = fdopen(out[0], "r");
    if (p->child < 0 || !p->to || !p->from) bench_die("no process for %s", args[1]);
}

#endif
