// Two models by LiteRT.js in Node, in turns: node measure.mjs ROUNDS SHAPE DENSE SPARSE
import fs from 'node:fs';
import {createRequire} from 'node:module';
import path from 'node:path';
import vm from 'node:vm';

// LiteRT.js is made for browsers: what it asks these for is read from disk.
const requireHere = createRequire(import.meta.url);
const wasm = path.join(path.dirname(requireHere.resolve('@litertjs/core')), '../wasm/');
Object.assign(globalThis, {
  self: globalThis,
  require: requireHere,
  __dirname: wasm,
  importScripts: (file) => vm.runInThisContext(fs.readFileSync(file, 'utf8'), {filename: file}),
  fetch: async (file) =>
    new Response(fs.readFileSync(String(file)), {headers: {'Content-Type': 'application/wasm'}}),
});

const {loadLiteRt, loadAndCompile, Tensor} = await import('@litertjs/core');
const [rounds, shape, ...files] = process.argv.slice(2).map((x, i) => (i < 2 ? JSON.parse(x) : x));
await loadLiteRt(wasm, {threads: false});
const models = [];
for (const file of files) {
  models.push(await loadAndCompile(new Uint8Array(fs.readFileSync(file)), {accelerator: 'wasm'}));
}
const size = shape.reduce((a, b) => a * b, 1);
const input = new Tensor(Float32Array.from({length: size}, (_, i) => Math.sin(0.7 * i)), shape);
const times = models.map(() => []);
const outputs = [];
for (let round = 0; round < rounds; round++) {
  for (const [i, model] of models.entries()) {
    const start = performance.now();
    const results = await model.run(input);
    times[i].push(performance.now() - start);
    if (round === 0) outputs.push((await results[0].moveTo('wasm')).toTypedArray().slice());
    results.forEach((result) => result.delete());
  }
}
const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
console.log(JSON.stringify({
  milliseconds: times.map(median),
  outputs: outputs.map((values) => Array.from(values)),
}));
process.exit(0);
