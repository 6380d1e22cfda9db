// node run_browser.mjs CHROMIUM URL STEPS: runs JSON steps in order on the sample's page at URL, prints their results as JSON.
import { chromium } from 'playwright-core';

// A browser that calls home is refused connections on a closed network, many at a time.
const QUIET = ['--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-quic', '--no-first-run'];

const STEPS = {
  /** The traces of the bundle at `bundle`. */
  trace: (page, step) =>
    page.evaluate(async ({ bundle, prompts, count }) => {
      const [{ openUrl }, { trace }] = await Promise.all([import('/web.mjs'), import('/tests/trace.mjs')]);
      return trace(await openUrl(bundle), prompts, count);
    }, step),

  /** What the page shows after its form was filled in and sent: `{state, output}`. */
  generate: async (page, { bundle, prompt, count }) => {
    await page.fill('[name=bundle]', bundle);
    await page.fill('[name=prompt]', prompt);
    await page.fill('[name=count]', String(count));
    await page.click('button');
    await page.waitForSelector('[data-state=done], [data-state=failed]');
    return { state: await page.getAttribute('body', 'data-state'), output: await page.textContent('output') };
  },
};

const [executablePath, url, steps] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: QUIET });
try {
  const page = await browser.newPage();
  const broken = [];
  page.on('pageerror', (error) => broken.push(error.message));
  await page.goto(url);
  const results = [];
  for (const step of JSON.parse(steps)) results.push(await STEPS[step.do](page, step));
  if (broken.length > 0) throw new Error(`errors in the page: ${broken.join('; ')}`);
  console.log(JSON.stringify(results));
} finally {
  await browser.close();
}
