// The page: what is chosen, and what is shown of it. Networks are run by inference.js.
import {decode, draw as drawOn} from './images.js';
import {check, loadEngine, loadNetwork, run, timeInTurns, TOLERANCE} from './inference.js';

const ROUNDS = 25;
const ROUND_MILLISECONDS = 20;
const SHOWN_CLASSES = 3;

const $ = (selector) => document.querySelector(selector);
const canvas = $('#image');
const context = canvas.getContext('2d', {willReadFrequently: true, colorSpace: 'srgb'});

let about; // models/models.json
let samples; // the pixels of all samples
const networks = new Map(); // name → what is in models.json and what inference.js has loaded
let image; // the pixels of the image that is shown
let denseName;
let sparseName;
let engine; // a promise, once it is loaded or being loaded
let busy = Promise.resolve(); // one thing at a time: clicks wait for what runs
let waiting = 0; // how many of them

function say(text, kind = '') {
  $('#status').textContent = text;
  $('#status').className = kind;
}

function element(name, content = '', attributes = {}) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(content);
  return made;
}

const percent = (part, digits = 1) => `${(100 * part).toFixed(digits)} %`;
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
const origin = ({command, date, versions, machine}) =>
  `${command}, ${date}, Keras ${versions.keras}, ${machine}`;

// ---------------------------------------------------------------- images

const draw = (source) => drawOn(context, source, about.image_size);

async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response;
}

async function loadSample(name) {
  return decode(await (await fetched(`samples/${name}`)).blob());
}

// ---------------------------------------------------------------- what is shown

function showFacts(id, network, milliseconds, slowest, largest) {
  const rows = [
    ['Time per image', milliseconds ? `${milliseconds.toFixed(2)} ms` : '–', milliseconds / slowest],
    ['File', megabytes(network.size), network.size / largest],
    ['Test accuracy', percent(network.test_accuracy), network.test_accuracy],
  ];
  $(`#${id} dl`).replaceChildren(
    ...rows.flatMap(([name, value, part]) => {
      const bar = element('span', '', {className: 'bar'});
      bar.style.setProperty('--part', Math.min(part || 0, 1));
      const shown = element('dd', value);
      shown.append(bar);
      return [element('dt', name), shown];
    }),
  );
}

function showPrediction(id, outputs) {
  const largest = Math.max(...outputs);
  const odds = Array.from(outputs, (value) => Math.exp(value - largest));
  const sum = odds.reduce((a, b) => a + b);
  const best = odds.map((value, i) => [value / sum, about.classes[i]]);
  best.sort((a, b) => b[0] - a[0]);
  $(`#${id} .prediction`).replaceChildren(
    ...best.slice(0, SHOWN_CLASSES).map(([part, name]) => {
      const bar = element('span', '', {className: 'bar'});
      bar.style.setProperty('--part', part);
      const shown = element('li', `${name} `);
      shown.append(element('b', percent(part, 0)), bar);
      return shown;
    }),
  );
}

/** Whether a network computes what it must; its card says so. */
function showAgreement(id, worst) {
  const agrees = worst <= TOLERANCE;
  $(`#${id}`).classList.toggle('broken', !agrees);
  const off = Number.isFinite(worst) ? percent(worst, 2) : 'no numbers at all, or too few';
  $(`#${id} .agreement`).textContent = agrees
    ? `✓ Outputs agree with the trained network: ${off} off at most.`
    : `✗ Wrong outputs: ${off} off. Nothing else on this card counts.`;
  return agrees;
}

/** What was shown of an earlier measurement does not stay. */
function clear() {
  for (const id of ['#faster', '#smaller', '#accuracy']) $(id).textContent = '–';
  for (const id of ['#dense', '#sparse']) {
    for (const part of ['dl', '.prediction', '.agreement']) $(`${id} ${part}`).replaceChildren();
    $(id).classList.remove('broken');
  }
}

function showResult(milliseconds, agree) {
  const [dense, sparse] = [networks.get(denseName), networks.get(sparseName)];
  const times = milliseconds.map((value, i) => (agree[i] ? value : undefined));
  const slowest = Math.max(...milliseconds);
  const largest = Math.max(dense.size, sparse.size);
  showFacts('dense', dense, times[0], slowest, largest);
  showFacts('sparse', sparse, times[1], slowest, largest);
  const both = agree.every(Boolean);
  const points = 100 * (sparse.test_accuracy - dense.test_accuracy);
  const figures = {
    '#faster': [`${(times[0] / times[1]).toFixed(1)} ×`, times[0] < times[1]],
    '#smaller': [`${(dense.size / sparse.size).toFixed(1)} ×`, dense.size < sparse.size],
    '#accuracy': [`${points < 0 ? '−' : '+'}${Math.abs(points).toFixed(1)}`, points < 0],
  };
  for (const [id, [text, isLoss]] of Object.entries(figures)) {
    $(id).textContent = both ? text : '–';
    $(id).classList.toggle('loss', both && isLoss);
  }
  if (!both) {
    say('A network computes something else than it was trained to: nothing to compare.', 'wrong');
    return;
  }
  say(
    `Dense ${times[0].toFixed(2)} ms, sparse ${times[1].toFixed(2)} ms per image; outputs agree ` +
      'with the trained networks.',
    'right',
  );
}

// ---------------------------------------------------------------- what is done

async function network(name) {
  if (!networks.has(name)) {
    const entry = about.networks.find((candidate) => candidate.name === name);
    const shape = [1, about.image_size, about.image_size, 3];
    networks.set(name, {...entry, ...(await loadNetwork(`models/${entry.file}`, shape))});
  }
  return networks.get(name);
}

async function pair() {
  engine ??= loadEngine();
  try {
    await engine;
  } catch (error) {
    engine = undefined; // the next try loads it anew
    throw error;
  }
  return [await network(denseName), await network(sparseName)];
}

async function measure() {
  say('Measuring …');
  const both = await pair();
  $('#sparse-title').textContent = `Sparse, ${percent(both[1].sparsity, 0)} zeros`;
  const milliseconds = await timeInTurns(both, image, ROUNDS, ROUND_MILLISECONDS);
  const agree = [];
  for (const [i, id] of ['dense', 'sparse'].entries()) {
    showPrediction(id, await run(both[i], image));
    agree.push(showAgreement(id, await check(both[i], samples, both[i].outputs)));
  }
  showResult(milliseconds, agree);
}

/** Does what was asked for, after what is being done; a failure is shown. */
function next(task) {
  waiting += 1;
  $('#measure').setAttribute('aria-disabled', 'true');
  busy = busy.then(async () => {
    waiting -= 1;
    try {
      await task();
      if (waiting === 0) await measure(); // else the next one does
    } catch (error) {
      console.error(error);
      clear();
      say(`This did not work: ${error.message ?? error}`, 'wrong');
    }
    if (waiting === 0) $('#measure').removeAttribute('aria-disabled');
  });
}

function choosePhoto(file) {
  for (const radio of document.getElementsByName('sample')) radio.checked = false;
  next(async () => {
    try {
      image = draw(await decode(file));
    } catch {
      throw new Error(`"${file.name}" is no image that this browser can read`);
    }
    canvas.setAttribute('aria-label', `Your photo ${file.name}, as the networks see it`);
  });
}

function choice(group, value, label, checked, chosen) {
  const radio = element('input', '', {type: 'radio', name: group, value, checked});
  radio.addEventListener('change', () => next(chosen));
  const shown = element('label', radio);
  shown.append(label);
  return shown;
}

async function start() {
  about = await (await fetched('models/models.json')).json();
  canvas.width = canvas.height = about.image_size;
  $('#classes').textContent = about.classes.join(', ');
  $('#rounds').textContent = ROUNDS;
  $('#about').textContent =
    `The networks: ${[...new Set(about.networks.map(origin))].join('; ')}. ` +
    'One training each; another seed gives other accuracies.';

  const bitmaps = await Promise.all(about.samples.map(loadSample));
  samples = bitmaps.map(draw);
  about.samples.forEach((name, i) => {
    const title = name.replace('.png', '').replaceAll('-', ' ');
    const picture = element('img', '', {src: `samples/${name}`, alt: title, title});
    const chosen = () => {
      image = draw(bitmaps[i]);
      canvas.setAttribute('aria-label', `Sample: ${title}, as the networks see it`);
    };
    $('#samples').append(choice('sample', name, picture, i === 0, chosen));
  });
  const sparse = about.networks.filter(({sparsity}) => sparsity > 0);
  sparse.forEach(({name, sparsity}, i) => {
    const label = ` ${percent(sparsity, 0)}`;
    const chosen = () => {
      sparseName = name;
    };
    $('#sparsities').append(choice('sparsity', name, label, i === 0, chosen));
  });
  sparseName = sparse[0].name;
  denseName = about.networks.find(({sparsity}) => sparsity === 0).name;

  $('#measure').addEventListener('click', () => waiting || next(() => {}));
  $('#file').addEventListener('change', ({target}) => target.files[0] && choosePhoto(target.files[0]));
  document.addEventListener('dragover', (event) => {
    event.preventDefault();
    $('#drop').classList.add('over');
  });
  document.addEventListener('dragleave', () => $('#drop').classList.remove('over'));
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    $('#drop').classList.remove('over');
    const [file] = event.dataTransfer.files;
    if (file) choosePhoto(file);
  });

  next(() => {
    image = draw(bitmaps[0]);
    canvas.setAttribute('aria-label', 'The first sample, as the networks see it');
  });
}

start().catch((error) => say(`The page could not start: ${error.message ?? error}`, 'wrong'));
