// In headless Chromium: npm test
import assert from 'node:assert/strict';
import fs from 'node:fs';
import {createRequire} from 'node:module';
import path from 'node:path';
import {after, afterEach, before, beforeEach, test} from 'node:test';
import {fileURLToPath} from 'node:url';
import {open, settled} from './chromium.mjs';

const HERE = fileURLToPath(new URL('.', import.meta.url));
const ABOUT = JSON.parse(fs.readFileSync(path.join(HERE, 'models/models.json'), 'utf8'));
const read = (name) => fs.readFileSync(path.join(HERE, name));

let chromium, page, requested, complaints, answers;

before(async () => {
  chromium = await open();
});
after(() => chromium.close());
afterEach(() => page.close());

beforeEach(async () => {
  page = await chromium.browser.newPage();
  [requested, complaints, answers] = [[], [], new Map()];
  page.on('console', (message) => {
    // LiteRT.js writes all that it has to say as errors.
    if (message.type() === 'error' && !/^(INFO|WARNING): /.test(message.text())) {
      complaints.push(message.text());
    }
  });
  page.on('pageerror', (error) => complaints.push(String(error)));
  await page.setRequestInterception(true);
  page.on('request', (request) => {
    requested.push(request.url());
    const name = path.basename(new URL(request.url()).pathname);
    if (answers.has(name)) request.respond({body: answers.get(name)});
    else request.continue();
  });
});

const visit = async () => {
  await page.goto(chromium.url);
  return settled(page);
};
const text = (selector) => page.$eval(selector, (element) => element.textContent);
const isBroken = (id) => page.$eval(`#${id}`, ({classList}) => classList.contains('broken'));

test('both networks run, agree with the trained ones, and are compared', async (t) => {
  const {kind, text: says} = await visit();
  assert.equal(kind, 'right', says);
  for (const id of ['dense', 'sparse']) {
    assert.match(await text(`#${id} .agreement`), /^✓/);
    assert.equal(await isBroken(id), false);
    assert.match(await text(`#${id} dl`), /Time per image\d+\.\d\d ms/);
    assert.equal(await page.$$eval(`#${id} .prediction li`, (items) => items.length), 3);
  }
  const [dense, sparse] = ABOUT.networks.map(({file}) => fs.statSync(path.join(HERE, 'models', file)).size);
  assert.equal(await text('#smaller'), `${(dense / sparse).toFixed(1)} ×`);
  assert.match(await text('#faster'), /^\d+\.\d ×$/);
  const isLoss = await page.$eval('#accuracy', (element) => element.classList.contains('loss'));
  assert.equal(isLoss, (await text('#accuracy')).startsWith('−'));
  assert.deepEqual(complaints, []);
  t.diagnostic(`${await text('#faster')} faster. ${says}`);
});

test('what is shown for a sample is what the network was trained to compute', async () => {
  await visit();
  const dense = ABOUT.networks.find(({sparsity}) => sparsity === 0);
  const outputs = dense.outputs[0];
  const best = ABOUT.classes[outputs.indexOf(Math.max(...outputs))];
  assert.ok((await text('#dense .prediction li')).startsWith(best));
});

test('nothing comes from another host', async () => {
  await visit();
  const origin = new URL(chromium.url).origin;
  assert.deepEqual(requested.filter((url) => !url.startsWith(origin) && !/^(data|blob):/.test(url)), []);
});

test('every sparse network can be chosen', async (t) => {
  await visit();
  for (const {name, sparsity} of ABOUT.networks.filter((network) => network.sparsity > 0)) {
    await page.click(`input[value=${name}]`);
    await page.waitForFunction(
      (title) => document.querySelector('#sparse-title').textContent.includes(title),
      {},
      `${100 * sparsity} %`,
    );
    const {kind, text: says} = await settled(page);
    assert.equal(kind, 'right', says);
    t.diagnostic(`${100 * sparsity} %: ${await text('#faster')} faster. ${says}`);
  }
});

test('a network that computes something else shows as broken', async () => {
  answers.set('sparse90.tflite', read('models/sparse80.tflite'));
  const {kind} = await visit();
  assert.equal(kind, 'wrong');
  assert.equal(await isBroken('sparse'), true);
  assert.equal(await isBroken('dense'), false);
  assert.match(await text('#sparse .agreement'), /^✗ Wrong outputs/);
  assert.equal(await text('#faster'), '–');
  assert.doesNotMatch(await text('#sparse dl'), / ms/);
});

for (const file of ['dense.tflite', 'sparse90.tflite', 'litert_wasm_internal.js']) {
  test(`without ${file} there is an error, and the page lives on`, async () => {
    answers.set(file, 'cut off');
    const {kind, text: says} = await visit();
    assert.equal(kind, 'wrong', says);
    assert.equal(await text('#faster'), '–');
    assert.equal(await text('#dense .agreement'), '');
    answers.clear();
    await page.click('#measure');
    await page.waitForFunction(() => document.querySelector('#status').className === 'right');
  });
}

test('of many choices the last one counts', async () => {
  await visit();
  await page.evaluate(() => document.getElementsByName('sample').forEach((radio) => radio.click()));
  await page.waitForFunction(() => !document.querySelector('#measure').hasAttribute('aria-disabled'));
  const dense = ABOUT.networks.find(({sparsity}) => sparsity === 0).outputs.at(-1);
  const best = ABOUT.classes[dense.indexOf(Math.max(...dense))];
  assert.ok((await text('#dense .prediction li')).startsWith(best));
  assert.equal(await page.$eval('input[name=sample]:checked', ({value}) => value), ABOUT.samples.at(-1));
});

test('a photo can be chosen; a file that is no image is said', async () => {
  await visit();
  const input = await page.$('#file');
  await input.uploadFile(path.join(HERE, 'samples/truck.png'));
  await page.waitForSelector('canvas[aria-label*="Your photo truck.png"]');
  assert.equal((await settled(page)).kind, 'right');
  assert.equal(await page.$('input[name=sample]:checked'), null);
  await input.uploadFile(path.join(HERE, 'style.css'));
  await page.waitForFunction(() => document.querySelector('#status').className === 'wrong');
  assert.match(await text('#status'), /"style\.css" is no image/);
});

test('the keyboard reaches everything', async () => {
  await visit();
  const reached = [];
  for (let i = 0; i < 4; i++) {
    await page.keyboard.press('Tab');
    reached.push(await page.evaluate(() => document.activeElement.name || document.activeElement.id));
  }
  assert.deepEqual(reached, ['sparsity', 'measure', 'sample', 'file']);
  await page.focus('input[name=sample]:checked');
  await page.keyboard.press('ArrowRight');
  const chosen = await page.$eval('input[name=sample]:checked', ({value}) => value);
  assert.equal(chosen, ABOUT.samples[1]);
});

test('no accessibility rule is broken', async () => {
  await visit();
  await page.addScriptTag({path: createRequire(import.meta.url).resolve('axe-core/axe.min.js')});
  for (const scheme of ['light', 'dark']) {
    await page.emulateMediaFeatures([{name: 'prefers-color-scheme', value: scheme}]);
    const {violations} = await page.evaluate(() => window.axe.run());
    assert.deepEqual(violations.map(({id, nodes}) => [scheme, id, nodes.map(({html}) => html)]), []);
  }
});
