// Generate greedily from an export with onnxruntime-web, on WebGPU or in WebAssembly.
import { Tokenizer } from '../node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs';
import * as ort from '../node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs';
import { greedy } from '../greedy.js';

const form = document.getElementById('form');
const status = document.getElementById('status');
const answer = document.getElementById('answer');
let opened = {};

async function read(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response.json();
}

async function chooseDevice(wanted) {
  const adapter = wanted === 'wasm' ? null : await navigator.gpu?.requestAdapter();
  if (wanted === 'webgpu' && !adapter) throw new Error('this browser has no WebGPU adapter');
  return adapter ? 'webgpu' : 'wasm';
}

async function open(model, device) {
  if (opened.model === model && opened.device === device) return opened;
  await opened.session?.release();
  opened = {};
  const config = await read(`${model}/config.json`);
  const presents = [];
  for (let n = 0; n < config.num_hidden_layers; n++) {
    presents.push(`present.${n}.key`, `present.${n}.value`);
  }
  const session = await ort.InferenceSession.create(`${model}/model.onnx`, {
    executionProviders: [device],
    logSeverityLevel: 3, // errors; by default it warns that shapes are computed on the CPU
    externalData: [{ path: 'model.onnx.data', data: `${model}/model.onnx.data` }],
    // The KV cache stays on the GPU from one token to the next.
    preferredOutputLocation:
      device === 'webgpu'
        ? Object.fromEntries(presents.map((name) => [name, 'gpu-buffer']))
        : undefined,
  });
  opened = { model, device, config, session };
  return opened;
}

async function openTokenizer(model) {
  return new Tokenizer(
    await read(`${model}/tokenizer.json`),
    await read(`${model}/tokenizer_config.json`),
  );
}

async function generate(fields) {
  status.textContent = 'Loading …';
  const model = fields.get('model').replace(/\/$/, '');
  const tokens = fields.get('tokens');
  const tokenizer = tokens ? null : await openTokenizer(model);
  const { config, session, device } = await open(model, await chooseDevice(fields.get('device')));
  const prompt = tokenizer ? tokenizer.encode(fields.get('prompt')).ids : tokens.split(',').map(Number);
  const generated = [];
  const start = performance.now();
  for await (const token of greedy(ort, session, config, prompt, fields.get('max-tokens'))) {
    generated.push(token);
    answer.textContent = tokenizer ? tokenizer.decode(generated) : JSON.stringify(generated);
  }
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  status.textContent = `${generated.length} tokens in ${seconds} s on ${device}`;
}

form.addEventListener('submit', async (event) => {
  event.preventDefault();
  const button = form.querySelector('button');
  button.disabled = true;
  answer.textContent = '';
  try {
    await generate(new FormData(form));
  } catch (error) {
    status.textContent = `Error: ${error.message}`;
  }
  button.disabled = false;
});
