// Fill and submit the browser example's form in headless Chromium, and print what came of it.
// node use_page.mjs CHROMIUM URL '[{"field": "value"}, ...]' [CHROMIUM-FLAG ...]
import { createRequire } from 'node:module';

const require = createRequire(new URL('../../examples/package.json', import.meta.url));
const { chromium } = require('playwright-core');
const [executablePath, url, submissions, ...flags] = process.argv.slice(2);

const browser = await chromium.launch({
  executablePath,
  args: ['--no-sandbox', '--disable-quic', '--disable-background-networking', '--no-first-run',
    '--disable-component-update', '--disable-sync', ...flags],
});
const page = await browser.newPage();
const requests = [];
const complaints = [];
page.on('request', (request) => requests.push(request.url()));
page.on('pageerror', (error) => complaints.push(String(error)));
page.on('console', (message) => {
  if (message.type() === 'error') complaints.push(message.text());
});
await page.goto(url);
const text = (id) => page.textContent(`#${id}`);
const results = [];
for (const fields of JSON.parse(submissions)) {
  for (const [name, value] of Object.entries(fields)) {
    const field = page.locator(`[name="${name}"]`);
    await (name === 'device' ? field.selectOption(value) : field.fill(value));
  }
  await page.click('button');
  await page.waitForSelector('button:enabled', { timeout: 120_000 });
  results.push({ status: await text('status'), answer: await text('answer') });
}
const adapter = await page.evaluate(async () => Boolean(await navigator.gpu?.requestAdapter()));
console.log(JSON.stringify({ results, requests, complaints, adapter }));
await browser.close();
