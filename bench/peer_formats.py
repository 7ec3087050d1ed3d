"""The PyTorch peer of bench/formats.c: a loop over the chosen experts of layers that are used in turn.

Arguments: WEIGHTS CALLS FORMAT n_calls T d ff E k n_layers. WEIGHTS holds w1, wu (E, d, ff) and w2 (E, ff, d) in
float32; CALLS x (n_calls, T, d), the routing weight and the int32 index (n_calls, T, k), and room for y (T, d). FORMAT
is f32 or bf16, of weights and activations. The layers after the first have the same experts in another order, each a
copy of its own. Commands on standard input, each answered by one number:
    check THREADS 0    y of the first call and layer into CALLS
    run THREADS N      seconds that N times all calls take
"""
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("bench: pytorch skipped: not installed (Debian package python3-torch)")


def read(path, offset, count, dtype):
    with open(path, "rb") as f:
        f.seek(offset)
        return torch.frombuffer(bytearray(f.read(4 * count)), dtype=dtype)


def main():
    weights, calls, name = sys.argv[1:4]
    n_calls, T, d, ff, E, k, n_layers = map(int, sys.argv[4:])
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[name]
    one = d * ff  # of an expert's matrix; stored (out, in), as checkpoints have it
    experts = []
    for layer in range(n_layers):
        for e in range(E):
            matrices = []
            for i, shape in enumerate(((d, ff), (d, ff), (ff, d))):
                w = read(weights, 4 * one * (i * E + (e + layer) % E), one, torch.float32)
                matrices.append(w.view(shape).t().contiguous().to(dtype))
            experts.append(matrices)
    sizes = [n_calls * T * d, n_calls * T * k, n_calls * T * k]
    x = read(calls, 0, sizes[0], torch.float32).view(n_calls, T, d).to(dtype)
    weight = read(calls, 4 * sizes[0], sizes[1], torch.float32).view(n_calls, T * k, 1).to(dtype)
    index = read(calls, 4 * (sizes[0] + sizes[1]), sizes[2], torch.int32).view(n_calls, T * k).long()
    groups = [[(e, (index[c] == e).nonzero().flatten()) for e in index[c].unique().tolist()] for c in range(n_calls)]
    silu = torch.nn.functional.silu

    def linear(h, w):
        if len(h) == 1 and dtype == torch.float32:  # four times as fast as a product of one row
            return torch.mv(w, h[0])[None]
        return torch.nn.functional.linear(h, w)

    def forward(call, layer):
        y = torch.zeros_like(x[call])
        for e, route in groups[call]:
            w1, wu, w2 = experts[layer * E + e]
            token = route // k
            h = x[call][token]
            h = silu(linear(h, w1)) * linear(h, wu)
            y.index_add_(0, token, linear(h, w2) * weight[call][route])
        return y

    turn = 0
    with torch.no_grad():
        for line in sys.stdin:
            command, threads, n = line.split()
            torch.set_num_threads(int(threads))
            if command == "check":
                y = forward(0, 0).float().contiguous()
                with open(calls, "r+b") as f:
                    f.seek(4 * sum(sizes))
                    f.write(y.numpy().tobytes())
                print(0, flush=True)
                continue
            start = time.perf_counter()
            for _ in range(int(n)):
                for call in range(n_calls):
                    forward(call, turn % n_layers)
                    turn += 1
            print(time.perf_counter() - start, flush=True)


main()
