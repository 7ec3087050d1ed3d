#!/usr/bin/env python3
"""Random checkpoints of eight families: sizes, experts, groups, windows, shards, storage and keys drawn anew for each.
build/llm's logits and choices are held against an independent float64 model, numpy_ref.py in the folder MOE_MODELS.
usage: MOE_MODELS=DIR tests/long/checkpoints.py [--seeds 20] [--first 1] [--llm build/llm]
Needs python3-numpy. The last line is "N passed, N failed"."""
import argparse, json, math, os, random, struct, subprocess, sys, tempfile
import numpy as np

sys.path.insert(0, os.environ["MOE_MODELS"])
import numpy_ref

FAMILIES = "olmoe mixtral qwen3_moe qwen2_moe deepseek_v2 deepseek_v3 gpt_oss granitemoe".split()


def stored(name):  # a router's bias stays float32 in files of bfloat16
    return "correction_bias" not in name


def write(path, tensors, draw, half):
    header, blobs, at = {}, [], 0
    names = list(tensors)
    draw.shuffle(names)
    for name in names:
        a = tensors[name].astype("<f4")
        b = (a.view("<u4") >> 16).astype("<u2").tobytes() if half and stored(name) else a.tobytes()
        kind = "BF16" if half and stored(name) else "F32"
        header[name] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [at, at + len(b)]}
        blobs.append(b)
        at += len(b)
    text = json.dumps(header).encode() + b" " * draw.choice([0, 1, 3, 8])  # so that data is not always aligned
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def save(folder, config, tensors, draw):
    half = draw.random() < 0.3
    if half:
        for name in filter(stored, tensors):
            tensors[name] = ((tensors[name].view("<u4") >> 16) << 16).view("<f4").copy()
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
    json.dump(config, open(folder + "/config.json", "w"))
    n = draw.choice([1, 1, 2, 3])
    if n == 1:
        return write(folder + "/model.safetensors", tensors, draw, half)
    place = {name: draw.randrange(n) for name in tensors}
    files = ["model-%05d-of-%05d.safetensors" % (i + 1, n) for i in range(n)]
    for i in set(place.values()):
        write(folder + "/" + files[i], {k: tensors[k] for k in tensors if place[k] == i}, draw, half)
    index = {"metadata": {"total_size": 1}, "weight_map": {k: files[place[k]] for k in tensors}}
    json.dump(index, open(folder + "/model.safetensors.index.json", "w"))


class Maker:
    """One checkpoint: its config, its tensors."""

    def __init__(self, family, seed):
        self.draw, self.normal, self.tensors, self.family = random.Random(seed), np.random.default_rng(seed), {}, family
        pick = self.draw.choice
        self.heads, self.head = pick([1, 2, 4, 8]), pick([8, 16, 32])
        self.kv = pick([k for k in (1, 2, 4, 8) if self.heads % k == 0])
        self.d, self.layers = pick([32, 48, 64, 80, 112]), pick([1, 2, 3, 4])
        self.experts, self.width, self.dense = pick([4, 6, 8, 12, 16]), pick([8, 20, 24, 40]), pick([16, 36, 64])
        if family in ("olmoe", "mixtral", "qwen2_moe", "granitemoe"):
            self.d = self.heads * self.head
            while self.d % 16: self.d, self.head = 2 * self.d, 2 * self.head
        self.config = {
            "architectures": ["X"], "model_type": family, "vocab_size": pick([50, 97, 304]), "hidden_size": self.d,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "rms_norm_eps": pick([1e-5, 1e-6]),
            "num_key_value_heads": self.kv, "rope_theta": pick([10000, 10000.0, 5e5, 1e6]), "hidden_act": "silu",
            "num_experts_per_tok": min(pick([1, 2, 3, 4]), self.experts), "max_position_embeddings": 4096,
            "tie_word_embeddings": self.draw.random() < 0.4, "rope_scaling": None, "use_cache": True}
        self.sparse = [True] * self.layers
        getattr(self, family)()
        self.fill()

    # -- the families' own keys --
    def olmoe(self):
        pick = self.draw.choice
        self.config.update(num_experts=self.experts, intermediate_size=self.width, clip_qkv=pick([None, 1.25, 8.0]))
        if self.draw.random() < 0.7: self.config["norm_topk_prob"] = pick([True, False])

    def mixtral(self):
        self.config.update(num_local_experts=self.experts, intermediate_size=self.width,
                           sliding_window=self.draw.choice([None, 4, 8, 4096]))
        if self.draw.random() < 0.5: self.config["head_dim"] = self.head = self.draw.choice([8, 16, 32])

    def qwen(self, only):
        pick, step = self.draw.choice, self.draw.choice([1, 1, 2])
        self.config.update(num_experts=self.experts, moe_intermediate_size=self.width, intermediate_size=self.dense,
                           norm_topk_prob=pick([True, False]), decoder_sparse_step=step, mlp_only_layers=only,
                           use_sliding_window=False, sliding_window=pick([None, 4]))
        self.sparse = [l not in only and (l + 1) % step == 0 for l in range(self.layers)]

    def qwen3_moe(self):
        self.qwen(sorted(self.draw.sample(range(self.layers), self.draw.randrange(self.layers))))
        self.config.update(head_dim=self.head, attention_bias=self.draw.random() < 0.3)

    def qwen2_moe(self):
        self.qwen([])
        self.config["shared_expert_intermediate_size"] = self.draw.choice([16, 24, 40])

    def granitemoe(self):
        pick = self.draw.choice
        self.config.update(num_local_experts=self.experts, intermediate_size=self.width, residual_multiplier=0.22,
                           embedding_multiplier=pick([1.0, 12.0]), attention_multiplier=pick([0.0625, 0.3]),
                           logits_scaling=pick([1.0, 6.0]))

    def gpt_oss(self):
        pick = self.draw.choice
        kinds = ["sliding_attention", "full_attention"]
        yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": pick([4.0, 32.0]), "rope_type": "yarn",
                "original_max_position_embeddings": 4096, "truncate": pick([True, False])}
        self.config.update(num_local_experts=self.experts, intermediate_size=self.width, head_dim=self.head,
                           sliding_window=pick([3, 8]), layer_types=[pick(kinds) for _ in range(self.layers)],
                           swiglu_limit=7.0, attention_bias=True, rope_scaling=yarn)

    def deepseek(self, method, **more):
        pick, E = self.draw.choice, self.experts
        groups = pick([g for g in (1, 2, 3, 4) if E % g == 0 and E // g >= 2])
        top = self.draw.randint(1, groups)
        while top * (E // groups) < self.config["num_experts_per_tok"]: top += 1
        self.config.update(
            n_routed_experts=E, moe_intermediate_size=self.width, intermediate_size=self.dense, n_group=groups,
            topk_group=top, n_shared_experts=pick([1, 2]), routed_scaling_factor=pick([1.0, 2.5, 16.0]),
            first_k_dense_replace=self.draw.randrange(self.layers), moe_layer_freq=1, kv_lora_rank=pick([16, 32]),
            q_lora_rank=pick([None, 24]), qk_nope_head_dim=pick([8, 16]), qk_rope_head_dim=pick([8, 16]),
            v_head_dim=pick([8, 16, 24]), num_key_value_heads=self.heads, topk_method=method, **more)
        self.sparse = [l >= self.config["first_k_dense_replace"] for l in range(self.layers)]

    def deepseek_v2(self):
        self.deepseek(self.draw.choice(["greedy", "group_limited_greedy"]), norm_topk_prob=False,
                      scoring_func="softmax")

    def deepseek_v3(self):
        self.deepseek("noaux_tc", norm_topk_prob=self.draw.random() < 0.7, scoring_func="sigmoid")
        if self.draw.random() < 0.4:
            self.config["rope_scaling"] = {
                "type": "yarn", "factor": self.draw.choice([4, 40]), "original_max_position_embeddings": 4096,
                "beta_fast": 32, "beta_slow": 1, "mscale": self.draw.choice([1.0, 0.707]),
                "mscale_all_dim": self.draw.choice([1.0, 0.5])}

    # -- tensors --
    def add(self, name, *shape, scale=None):
        scale = 1 / math.sqrt(shape[-1]) if scale is None else scale
        self.tensors[name] = (self.normal.standard_normal(shape) * scale).astype("<f4")

    def norm(self, name, n):
        self.tensors[name + ".weight"] = (1 + 0.3 * self.normal.standard_normal(n)).astype("<f4")

    def ffn(self, name, width, parts=("gate_proj", "up_proj", "down_proj")):
        for part, shape in zip(parts, ((width, self.d), (width, self.d), (self.d, width))):
            self.add("%s%s.weight" % (name, part), *shape)

    def attention(self, a):
        t, c, d, H = self.family, self.config, self.d, self.heads
        if t.startswith("deepseek"):
            nope, rope, v, rank = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
            if c["q_lora_rank"] is None:
                self.add(a + "q_proj.weight", H * (nope + rope), d)
            else:
                self.add(a + "q_a_proj.weight", 24, d)
                self.norm(a + "q_a_layernorm", 24)
                self.add(a + "q_b_proj.weight", H * (nope + rope), 24)
            self.add(a + "kv_a_proj_with_mqa.weight", rank + rope, d)
            self.norm(a + "kv_a_layernorm", rank)
            self.add(a + "kv_b_proj.weight", H * (nope + v), rank)
            return self.add(a + "o_proj.weight", d, H * v)
        every = t == "gpt_oss" or c.get("attention_bias", False)
        for part, n in (("q", H * self.head), ("k", self.kv * self.head), ("v", self.kv * self.head)):
            self.add("%s%s_proj.weight" % (a, part), n, d)
            if every or t == "qwen2_moe": self.add("%s%s_proj.bias" % (a, part), n, scale=0.5)
        self.add(a + "o_proj.weight", d, H * self.head)
        if every: self.add(a + "o_proj.bias", d, scale=0.5)
        if t == "gpt_oss": self.add(a + "sinks", H, scale=1.0)
        if t in ("olmoe", "qwen3_moe"):
            each = t == "qwen3_moe"
            self.norm(a + "q_norm", self.head * (1 if each else H))
            self.norm(a + "k_norm", self.head * (1 if each else self.kv))

    def mixture(self, m):
        t, c, d, E, f = self.family, self.config, self.d, self.experts, self.width
        if t == "granitemoe":
            self.add(m + "router.layer.weight", E, d, scale=0.3)
            self.add(m + "input_linear.weight", E, 2 * f, d)
            return self.add(m + "output_linear.weight", E, d, f)
        if t == "gpt_oss":
            self.add(m + "router.weight", E, d, scale=0.3)
            self.add(m + "router.bias", E, scale=0.5)
            self.add(m + "experts.gate_up_proj", E, d, 2 * f, scale=1 / math.sqrt(d))
            self.add(m + "experts.gate_up_proj_bias", E, 2 * f, scale=0.5)
            self.add(m + "experts.down_proj", E, f, d, scale=1 / math.sqrt(f))
            return self.add(m + "experts.down_proj_bias", E, d, scale=0.5)
        self.add(m + "gate.weight", E, d, scale=0.3)
        if t == "deepseek_v3":  # above 0: transformers puts 0 for the groups that are out, the authors -infinity
            self.add(m + "gate.e_score_correction_bias", E, scale=0.1)
            self.tensors[m + "gate.e_score_correction_bias"] = abs(self.tensors[m + "gate.e_score_correction_bias"])
        parts = ("w1", "w3", "w2") if t == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for e in range(E): self.ffn("%sexperts.%d." % (m, e), f, parts)
        if t == "qwen2_moe":
            self.ffn(m + "shared_expert.", c["shared_expert_intermediate_size"])
            self.add(m + "shared_expert_gate.weight", 1, d)
        if t.startswith("deepseek"): self.ffn(m + "shared_experts.", f * c["n_shared_experts"])

    def fill(self):
        self.add("model.embed_tokens.weight", self.config["vocab_size"], self.d, scale=1.0)
        self.norm("model.norm", self.d)
        if not self.config["tie_word_embeddings"]: self.add("lm_head.weight", self.config["vocab_size"], self.d)
        for l in range(self.layers):
            p = "model.layers.%d." % l
            self.norm(p + "input_layernorm", self.d)
            self.norm(p + "post_attention_layernorm", self.d)
            self.attention(p + "self_attn.")
            m = p + ("block_sparse_moe." if self.family in ("mixtral", "granitemoe") else "mlp.")
            if self.sparse[l]: self.mixture(m)
            else: self.ffn(m, self.dense)


def differs(made, folder, llm):
    """What is wrong with the program's run of it, or None."""
    save(folder, made.config, made.tensors, made.draw)
    ids = [made.draw.randrange(made.config["vocab_size"]) for _ in range(made.draw.choice([1, 5, 17]))]
    want = numpy_ref.forward(dict({"norm_topk_prob": False}, **made.config), made.tensors, ids)
    run = subprocess.run([llm, "--model", folder, "--ids", ",".join(map(str, ids)), "--dump", folder + "/o", "--quiet",
                          "--batch", str(made.draw.choice([1, 3, 128]))], capture_output=True, text=True)
    if run.returncode: return "exit %d: %s" % (run.returncode, run.stderr.strip()[-300:])
    chosen, experts = np.stack(want["sel"]), np.load(folder + "/o.experts.npy")
    if chosen.shape != experts.shape or (chosen != experts).any(): return "other experts"
    apart = float(np.abs(np.load(folder + "/o.logits.npy") - want["logits"]).max())
    most = 1e-4 * max(1.0, float(np.abs(want["logits"]).max()) / 4)  # numpy_ref's folder: 1e-4 for logits of size 4
    return "logits %g apart, %g allowed" % (apart, most) if not apart <= most else None


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--seeds", type=int, default=20)
    args.add_argument("--first", type=int, default=1)
    args.add_argument("--llm", default="build/llm")
    o = args.parse_args()
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(o.first, o.first + o.seeds):
            for family in FAMILIES:
                made = Maker(family, seed)
                if not any(made.sparse): continue
                wrong = differs(made, folder, o.llm)
                passed, failed = passed + (not wrong), failed + bool(wrong)
                if wrong: print("FAILED: %s, seed %d: %s\n  %s" % (family, seed, wrong, json.dumps(made.config)))
    print("%d passed, %d failed" % (passed, failed))
    return failed > 0


sys.exit(main())
