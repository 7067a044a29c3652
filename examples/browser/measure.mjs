// Times the networks of the page in headless Chromium: node measure.mjs ROUNDS [SCREENSHOT]
import {open, settled} from './chromium.mjs';

const [rounds, screenshot] = process.argv.slice(2);
const {url, browser, close} = await open();
try {
  const page = await browser.newPage();
  await page.setViewport({width: 960, height: 1240, deviceScaleFactor: 1});
  await page.goto(url);
  const {kind, text} = await settled(page);
  if (kind !== 'right') throw new Error(text);
  const pairs = await page.evaluate(async (rounds) => {
    const inference = await import('./inference.js');
    const images = await import('./images.js');
    const about = await (await fetch('models/models.json')).json();
    const shape = [1, about.image_size, about.image_size, 3];
    const pixels = Float32Array.from({length: 3 * about.image_size ** 2}, (_, i) => Math.sin(i));
    const load = async (entry) => ({
      ...entry,
      ...(await inference.loadNetwork(`models/${entry.file}`, shape)),
    });
    const dense = await load(about.networks.find(({sparsity}) => sparsity === 0));
    const {image_size: size} = about;
    const samples = await Promise.all(
      about.samples.map(async (name) => {
        const source = await images.decode(await (await fetch(`samples/${name}`)).blob());
        return images.draw(new OffscreenCanvas(size, size).getContext('2d'), source, size);
      }),
    );
    const found = [];
    for (const entry of about.networks.filter(({sparsity}) => sparsity > 0)) {
      const sparse = await load(entry);
      const [denseTime, sparseTime] = await inference.timeInTurns([dense, sparse], pixels, rounds, 20);
      for (const network of [dense, sparse]) {
        const off = await inference.check(network, samples, network.outputs);
        if (!(off <= inference.TOLERANCE)) throw new Error(`${network.file} is ${off} off`);
      }
      found.push({sparsity: entry.sparsity, dense: denseTime, sparse: sparseTime});
    }
    return found;
  }, Number(rounds));
  if (screenshot) {
    await page.click('#measure');
    await page.waitForFunction(() => !document.querySelector('#measure').hasAttribute('aria-disabled'));
    await page.screenshot({path: screenshot});
  }
  console.log(JSON.stringify({chromium: await browser.version(), pairs}));
} finally {
  await close();
}
