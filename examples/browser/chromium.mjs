// The page in a headless Chromium, for the test and for measuring.
import {execFileSync, spawn} from 'node:child_process';
import {once} from 'node:events';
import {fileURLToPath} from 'node:url';
import puppeteer from 'puppeteer-core';

const NAMES = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'];

function executable() {
  for (const name of process.env.CHROMIUM ? [process.env.CHROMIUM] : NAMES) {
    try {
      return execFileSync('which', [name], {encoding: 'utf8'}).trim();
    } catch {
      continue;
    }
  }
  throw new Error(`No Chromium: install it, or name it in CHROMIUM. Looked for ${NAMES}.`);
}

/** Serves the page as `make browser` does and opens a browser: {url, browser, close}. */
export async function open() {
  const server = spawn(
    process.env.PYTHON ?? 'python3',
    ['-u', '-m', 'http.server', '0', '--bind', '127.0.0.1'],
    {cwd: fileURLToPath(new URL('.', import.meta.url)), stdio: ['ignore', 'pipe', 'ignore']},
  );
  const [line] = await once(server.stdout, 'data');
  const port = /port (\d+)/.exec(line)[1];
  const browser = await puppeteer.launch({
    executablePath: executable(),
    args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking'],
  });
  const close = async () => {
    await browser.close();
    server.kill();
  };
  return {url: `http://127.0.0.1:${port}/index.html`, browser, close};
}

/** Waits until the page has measured; what its status line says, and of what kind it is. */
export async function settled(page) {
  await page.waitForFunction(() => {
    const {className, textContent} = document.querySelector('#status');
    return className && !textContent.startsWith('Measuring');
  });
  return page.$eval('#status', ({className, textContent}) => ({kind: className, text: textContent}));
}
