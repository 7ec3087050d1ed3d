"""The PyTorch peer of bench/layer.c: a loop over experts, one process for a shape.

Arguments: FILE n_calls T d ff n_experts k training accumulate. FILE holds x (n_calls, T, d), dy (T, d), the routing
weight (n_calls, T, k) and int32 index (n_calls, T, k), w1 and wu (n_experts, d, ff), w2 (n_experts, ff, d), and room
for y and dx (T, d). Commands on standard input, each answered by one number:
    check 1 0        y and dx of the first call into FILE, which is not used afterwards
    run THREADS N    seconds that N times all calls take
"""
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("bench: pytorch skipped: not installed (Debian package python3-torch)")


class Call:
    """One pass: its tokens, and for each expert that is hit which tokens, with which weights."""

    def __init__(self, x, index, weight, training):
        self.x = x.clone().requires_grad_(training)
        self.weight = weight.reshape(-1).clone().requires_grad_(training)
        k = index.shape[1]
        self.groups = []
        for e in index.unique().tolist():
            route = (index.reshape(-1) == e).nonzero().flatten()
            self.groups.append((e, route // k, route))


def forward(call, w1, wu, w2):
    y = torch.zeros_like(call.x)
    for e, token, route in call.groups:
        x = call.x[token]
        h = torch.nn.functional.silu(x @ w1[e]) * (x @ wu[e])
        y.index_add_(0, token, (h @ w2[e]) * call.weight[route, None])
    return y


def main():
    path = sys.argv[1]
    n_calls, T, d, ff, n_experts, k, training, accumulate = map(int, sys.argv[2:])
    sizes = [n_calls * T * d, T * d, n_calls * T * k, n_calls * T * k] + [n_experts * d * ff] * 3 + [T * d, T * d]

    def file():
        return torch.from_file(path, shared=True, size=sum(sizes), dtype=torch.float32).split(sizes)

    parts = file()
    x, dy, weight = parts[0].view(n_calls, T, d), parts[1].view(T, d).clone(), parts[2].view(n_calls, T, k)
    index = parts[3].view(torch.int32).view(n_calls, T, k).long()
    w1, wu, w2 = ([w.clone().requires_grad_(bool(training)) for w in part.view(n_experts, *shape)]
                  for part, shape in zip(parts[4:7], ((d, ff), (d, ff), (ff, d))))
    calls = [Call(x[c], index[c], weight[c], bool(training)) for c in range(n_calls)]
    del parts, x, weight, index  # everything is cloned; the file can go
    leaves = w1 + wu + w2

    def run(call):
        if not training:
            with torch.no_grad():
                return forward(call, w1, wu, w2)
        call.x.grad = call.weight.grad = None
        y = forward(call, w1, wu, w2)
        y.backward(dy)
        return y

    for line in sys.stdin:
        command, threads, n = line.split()
        torch.set_num_threads(int(threads))
        if command == "check":
            y = run(calls[0]).detach()
            file()[7].copy_(y.flatten())
            if training:
                file()[8].copy_(calls[0].x.grad.flatten())
            print(0, flush=True)
            continue
        seconds = 0.0
        for _ in range(int(n)):
            start = time.perf_counter()
            if not accumulate:
                for w in leaves:
                    w.grad = None
            for call in calls:
                run(call)
            seconds += time.perf_counter() - start
        print(seconds, flush=True)


main()
