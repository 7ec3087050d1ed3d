"""The PyTorch peer of bench/train_step.c: a whole training step of a dense decoder, forward, backward and AdamW.

Arguments: batch length width layers heads vocab hidden. The network is the one that the benchmark trains: RMSNorm, norms
of queries and keys over the whole projection, rotary positions, causal attention, GELU (tanh), no biases, the head tied
to the embedding; random weights of the same sizes. Commands on standard input, each answered by one number:
    loss 1 0         nats a token of the first step
    run THREADS N    seconds that N steps take
"""
import math
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("bench: pytorch skipped: not installed (Debian package python3-torch)")

BATCH, LENGTH, WIDTH, LAYERS, HEADS, VOCAB, HIDDEN = map(int, sys.argv[1:8])
HEAD = WIDTH // HEADS


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w


def turn(x, cos, sin):
    a, b = x.split(HEAD // 2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model:
    def __init__(self):
        torch.manual_seed(1)

        def matrix(out, into, deviation):
            return (torch.randn(out, into) * deviation).requires_grad_(True)

        wide = 1 / math.sqrt(WIDTH)
        self.embed = matrix(VOCAB, WIDTH, 0.02)
        self.layer = [dict(n1=torch.ones(WIDTH, requires_grad=True), n2=torch.ones(WIDTH, requires_grad=True),
                           nq=torch.ones(WIDTH, requires_grad=True), nk=torch.ones(WIDTH, requires_grad=True),
                           qkv=matrix(3 * WIDTH, WIDTH, wide), out=matrix(WIDTH, WIDTH, wide / math.sqrt(2 * LAYERS)),
                           w1=matrix(HIDDEN, WIDTH, wide), w2=matrix(WIDTH, HIDDEN, 1 / math.sqrt(HIDDEN)))
                      for _ in range(LAYERS)]
        self.last = torch.ones(WIDTH, requires_grad=True)
        angle = torch.arange(LENGTH)[:, None] * 10000 ** (-torch.arange(0, HEAD, 2) / HEAD)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.hidden = torch.full((LENGTH, LENGTH), -math.inf).triu(1)

    def parameters(self):
        return [self.embed, self.last] + [w for layer in self.layer for w in layer.values()]

    def loss(self, token, target):
        x = self.embed[token]
        for w in self.layer:
            q, k, v = (norm(x, w["n1"]) @ w["qkv"].T).split(WIDTH, -1)
            q, k, v = (t.view(BATCH, LENGTH, HEADS, HEAD).transpose(1, 2)
                       for t in (norm(q, w["nq"]), norm(k, w["nk"]), v))
            q, k = turn(q, self.cos, self.sin), turn(k, self.cos, self.sin)
            p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(HEAD) + self.hidden, -1)
            x = x + (p @ v).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH) @ w["out"].T
            h = torch.nn.functional.gelu(norm(x, w["n2"]) @ w["w1"].T, approximate="tanh")
            x = x + h @ w["w2"].T
        logits = norm(x, self.last) @ self.embed.T
        return torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), target.reshape(-1))


def main():
    model = Model()
    token = torch.randint(VOCAB, (BATCH, LENGTH + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = model.loss(token[:, :-1], token[:, 1:])
        loss.backward()
        optimizer.step()
        return loss.item()

    for line in sys.stdin:
        command, threads, n = line.split()
        torch.set_num_threads(int(threads))
        if command == "loss":
            print(step(), flush=True)
            continue
        start = time.perf_counter()
        for _ in range(int(n)):
            step()
        print(time.perf_counter() - start, flush=True)


main()
