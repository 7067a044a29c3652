// Runs networks by LiteRT.js, compares what they compute, and times them in turns.
import {loadAndCompile, loadLiteRt, Tensor} from '@litertjs/core';

export const TOLERANCE = 0.01; // of the largest output; weights are stored in half precision

// Browsers compile WebAssembly again, better, while it runs.
const WARM_UP_MILLISECONDS = 250;

export async function loadEngine() {
  await loadLiteRt(new URL('./node_modules/@litertjs/core/wasm/', import.meta.url).href, {
    threads: false,
  });
}

export async function loadNetwork(url, shape) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  return {shape, size: bytes.length, model: await loadAndCompile(bytes, {accelerator: 'wasm'})};
}

/** What a network computes for one image, as an array of its own. */
export async function run(network, pixels) {
  const input = new Tensor(pixels, network.shape);
  let results = [];
  try {
    results = await network.model.run(input);
    return (await results[0].moveTo('wasm')).toTypedArray().slice();
  } finally {
    input.delete();
    results.forEach((result) => result.delete());
  }
}

/** The largest difference, in parts of the largest expected value; 1 or more if it is no number. */
export function difference(outputs, expected) {
  if (outputs.length !== expected.length) return Infinity;
  const largest = Math.max(...expected.map(Math.abs));
  const worst = Math.max(...expected.map((value, i) => Math.abs(outputs[i] - value)));
  return Number.isNaN(worst) ? Infinity : worst / largest;
}

/** The largest difference over all samples. */
export async function check(network, samples, expected) {
  let worst = 0;
  for (const [i, pixels] of samples.entries()) {
    worst = Math.max(worst, difference(await run(network, pixels), expected[i]));
  }
  return worst;
}

/** Milliseconds per run: medians over rounds in which all networks take their turns. */
export async function timeInTurns(networks, pixels, rounds, roundMilliseconds) {
  const input = new Tensor(pixels, networks[0].shape);
  const repeat = async ({model}, times) => {
    const start = performance.now();
    for (let i = 0; i < times; i++) {
      (await model.run(input)).forEach((result) => result.delete());
    }
    return (performance.now() - start) / times;
  };
  try {
    const times = networks.map(() => []);
    // Clocks of browsers are coarse: each turn repeats the run until it takes long enough.
    const repeats = async (network, milliseconds) =>
      Math.ceil(milliseconds / Math.max(await repeat(network, 5), 0.01));
    const counts = [];
    for (const network of networks) {
      await repeat(network, await repeats(network, WARM_UP_MILLISECONDS));
      counts.push(await repeats(network, roundMilliseconds));
    }
    for (let round = 0; round < rounds; round++) {
      for (const [i, network] of networks.entries()) {
        times[i].push(await repeat(network, counts[i]));
      }
      await new Promise((resolve) => setTimeout(resolve)); // the page stays alive
    }
    return times.map((values) => values.sort((a, b) => a - b)[values.length >> 1]);
  } finally {
    input.delete();
  }
}
