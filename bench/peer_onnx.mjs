// The ONNX Runtime peer of bench/formats.c: the operators com.microsoft.MoE (f32) and QMoE (int8, int4, a scale for
// each block of 32) of the CPU provider in the npm package onnxruntime-node, found from the folder that
// ONNXRUNTIME_NODE names, or from this one. A model is one operator, a layer; several layers are used in turn.
//
// Arguments: WEIGHTS CALLS FORMAT n_calls T d ff E k n_layers. WEIGHTS holds w1, wu (E, d, ff) and w2 (E, ff, d) in
// float32; CALLS x (n_calls, T, d), the routing weight and the int32 index (n_calls, T, k), and room for y (T, d). The
// layers after the first have the same experts in another order, each a copy of its own. Commands on standard input,
// each answered by one number:
//     check THREADS 0    y of the first call and layer into CALLS
//     run THREADS N      seconds that N times all calls take
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import readline from "node:readline";
import { createRequire } from "node:module";

const [weightsPath, callsPath, format, ...numbers] = process.argv.slice(2);
const [nCalls, T, d, ff, E, k, nLayers] = numbers.map(Number);
const bits = { f32: 32, int8: 8, int4: 4 }[format];
const block = 32;

// In int4 it has a kernel that is several times as fast, at some loss, and takes it for SwiGLU only when asked to.
process.env.ORT_USE_MLAS_Q4_GEMM_MOE ??= "1";
let ort;
try {
    const from = process.env.ONNXRUNTIME_NODE ?? import.meta.dirname ?? process.cwd();
    ort = createRequire(path.join(path.resolve(from), "package.json"))("onnxruntime-node");
} catch {
    console.error("bench: onnxruntime skipped: not installed (npm package onnxruntime-node; ONNXRUNTIME_NODE=DIR)");
    process.exit(0);
}

// ---- a model's file: protobuf by hand, as onnx.proto numbers the fields ----

function varint(n) {
    const bytes = [];
    for (; n > 127; n = Math.floor(n / 128)) bytes.push((n % 128) | 128);
    return Buffer.from([...bytes, n]);
}
const whole = (field, n) => Buffer.concat([varint(field * 8), varint(n)]);
const bytes = (field, b) => Buffer.concat([varint(field * 8 + 2), varint(b.length), b]);
const text = (field, s) => bytes(field, Buffer.from(s));
const message = (field, ...parts) => bytes(field, Buffer.concat(parts));
function real(field, x) {
    const b = Buffer.alloc(4);
    b.writeFloatLE(x);
    return Buffer.concat([varint(field * 8 + 5), b]);
}
const FLOAT = 1, UINT8 = 2;
const entry = (key, value) => message(13, text(1, key), text(2, String(value)));
// Initializers lie in a file beside the model, one after the other at multiples of 4,096 bytes.
const stored = (t, file) =>
    message(5, ...t.dims.map((n) => whole(1, n)), whole(2, t.type), text(8, t.name), entry("location", file),
        entry("offset", t.offset), entry("length", t.length), whole(14, 1));
const value = (field, name, dims) =>
    message(field, text(1, name),
        message(2, message(1, whole(1, FLOAT), message(2, ...dims.map((n) => message(1, whole(1, n)))))));
const integer = (name, n) => message(5, text(1, name), whole(3, n), whole(20, 2));
const number = (name, x) => message(5, text(1, name), real(2, x), whole(20, 1));
const word = (name, s) => message(5, text(1, name), text(4, s), whole(20, 3));

function model(tensors, file) {
    const quantised = bits < 32;
    const inputs = ["x", "router", "fc1", "", "fc2"];
    if (quantised) { // it would take the weights from a softmax over the chosen: its last input has them
        inputs.splice(3, 2, "fc1_scale", "", "fc2", "fc2_scale", ...Array(7).fill(""), "share");
    }
    const attributes = [word("activation_type", "swiglu"), integer("swiglu_fusion", 1), integer("k", k),
        integer("normalize_routing_weights", 0), number("activation_alpha", 1), number("activation_beta", 0)];
    if (quantised) attributes.push(integer("expert_weight_bits", bits), integer("block_size", block));
    const node = message(1, ...inputs.map((s) => text(1, s)), text(2, "y"), text(3, "mixture"),
        text(4, quantised ? "QMoE" : "MoE"), ...attributes, text(7, "com.microsoft"));
    const graph = message(7, node, text(2, "layer"), ...tensors.map((t) => stored(t, file)), value(11, "x", [T, d]),
        value(11, "router", [T, E]), ...(quantised ? [value(11, "share", [T, E])] : []), value(12, "y", [T, d]));
    return Buffer.concat([whole(1, 8), message(8, text(1, ""), whole(2, 17)),
        message(8, text(1, "com.microsoft"), whole(2, 1)), graph]);
}

// ---- the weights as the operators want them: fc1 (E, 2 ff, d), gate and up in turns; fc2 (E, d, ff) ----

function layout() {
    const of = (name, rows, columns) => {
        const all = [{ name, type: bits < 32 ? UINT8 : FLOAT, dims: [E, rows, columns * Math.min(bits, 8) / 8] }];
        if (bits < 32) all.push({ name: name + "_scale", type: FLOAT, dims: [E, rows, columns / block] });
        return all;
    };
    const tensors = [...of("fc1", 2 * ff, d), ...of("fc2", d, ff)];
    let at = 0;
    for (const t of tensors) {
        t.offset = at;
        t.length = t.dims.reduce((a, b) => a * b) * (t.type === FLOAT ? 4 : 1);
        at += Math.ceil(t.length / 4096) * 4096;
    }
    return tensors;
}
// (rows, columns) of a file's matrix (columns, rows), every `step` rows from `first` on, into lines of `out`.
function turned(from, rows, columns, out, first, step) {
    for (let r = 0; r < rows; r++)
        for (let c = 0, at = (first + step * r) * columns; c < columns; c++) out[at + c] = from[c * rows + r];
}
// w = (q - zero) scale, the highest magnitude of a block at the end of the range; low half of a byte first.
function quantise(from, out, scales) {
    const most = bits === 8 ? 127 : 7, zero = bits === 8 ? 128 : 8;
    for (let b = 0, at = 0; b < scales.length; b++, at += block) {
        let high = 0;
        for (let i = at; i < at + block; i++) high = Math.max(high, Math.abs(from[i]));
        const scale = Math.fround(high / most), inverse = scale > 0 ? 1 / scale : 0;
        scales[b] = scale;
        for (let i = at; i < at + block; i++) {
            const q = Math.max(-most, Math.min(most, Math.round(from[i] * inverse))) + zero;
            if (bits === 8) out[i] = q;
            else if (i % 2) out[i >> 1] |= q << 4;
            else out[i >> 1] = q;
        }
    }
}
function floats(file, offset, count) {
    const b = Buffer.allocUnsafeSlow(4 * count);
    fs.readSync(file, b, 0, b.length, 4 * offset);
    return new Float32Array(b.buffer, b.byteOffset, count);
}
function put(file, a, offset) {
    fs.writeSync(file, Buffer.from(a.buffer, a.byteOffset, a.byteLength), 0, a.byteLength, offset);
}

const folder = fs.mkdtempSync(path.join(fs.existsSync("/dev/shm") ? "/dev/shm" : os.tmpdir(), "moe-onnx-"));
process.on("exit", () => fs.rmSync(folder, { recursive: true, force: true }));
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => process.exit(1));

const tensors = layout(), one = d * ff, source = fs.openSync(weightsPath);
const files = Array.from({ length: nLayers }, (_, l) => fs.openSync(path.join(folder, `weights${l}`), "w"));
const fc1 = new Float32Array(2 * one), fc2 = new Float32Array(one);
for (let e = 0; e < E; e++) {
    turned(floats(source, e * one, one), ff, d, fc1, 0, 2);
    turned(floats(source, (E + e) * one, one), ff, d, fc1, 1, 2);
    turned(floats(source, (2 * E + e) * one, one), d, ff, fc2, 0, 1);
    let parts = [fc1, fc2];
    if (bits < 32)
        parts = parts.flatMap((w) => {
            const out = new Uint8Array((w.length * bits) / 8), scales = new Float32Array(w.length / block);
            quantise(w, out, scales);
            return [out, scales];
        });
    for (let l = 0; l < nLayers; l++)
        tensors.forEach((t, i) => put(files[l], parts[i], t.offset + ((e + l) % E) * parts[i].byteLength));
}
files.forEach((file, l) => {
    const last = tensors[tensors.length - 1];
    fs.ftruncateSync(file, last.offset + last.length);
    fs.closeSync(file);
    fs.writeFileSync(path.join(folder, `layer${l}.onnx`), model(tensors, `weights${l}`));
});
fs.closeSync(source);

// ---- the calls: logits whose softmax has the routing weights, what is left of 1 spread over the others ----

const callsFile = fs.openSync(callsPath, "r+");
const x = floats(callsFile, 0, nCalls * T * d), weight = floats(callsFile, nCalls * T * d, nCalls * T * k);
const index = new Int32Array(floats(callsFile, nCalls * T * (d + k), nCalls * T * k).buffer);
const calls = Array.from({ length: nCalls }, (_, c) => {
    const router = new Float32Array(T * E), share = new Float32Array(T * E);
    for (let t = 0; t < T; t++) {
        const at = (c * T + t) * k, mine = weight.subarray(at, at + k), sum = mine.reduce((a, b) => a + b, 0);
        router.fill(Math.log(Math.max(1 - sum, 1e-30) / (E - k)), t * E, (t + 1) * E);
        for (let i = 0; i < k; i++) {
            router[t * E + index[at + i]] = Math.log(mine[i]);
            share[t * E + index[at + i]] = mine[i];
        }
    }
    const call = { x: new ort.Tensor("float32", x.subarray(c * T * d, (c + 1) * T * d), [T, d]),
        router: new ort.Tensor("float32", router, [T, E]) };
    if (bits < 32) call.share = new ort.Tensor("float32", share, [T, E]);
    return call;
});

let sessions = [], threadsOf = 0, turn = 0;
async function open(threads) {
    if (threads === threadsOf) return;
    await Promise.all(sessions.map((s) => s.release()));
    sessions = [];
    for (let l = 0; l < nLayers; l++)
        sessions.push(await ort.InferenceSession.create(path.join(folder, `layer${l}.onnx`),
            { intraOpNumThreads: threads, interOpNumThreads: 1, executionProviders: ["cpu"] }));
    threadsOf = threads;
}
for await (const line of readline.createInterface({ input: process.stdin })) {
    const [command, threads, n] = line.split(" ");
    await open(Number(threads));
    if (command === "check") {
        const { y } = await sessions[0].run(calls[0]);
        put(callsFile, y.data, 4 * nCalls * T * (d + 2 * k));
        console.log(0);
        continue;
    }
    const start = process.hrtime.bigint();
    for (let i = 0; i < Number(n); i++)
        for (const call of calls) await sessions[turn++ % nLayers].run(call);
    console.log(Number(process.hrtime.bigint() - start) * 1e-9);
}
process.exit(0);
