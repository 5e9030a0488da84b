// Generate greedily from an export with onnxruntime-node.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { Tokenizer } from '@huggingface/tokenizers';
import ort from 'onnxruntime-node';
import { greedy } from '../greedy.js';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    tokens: { type: 'string' }, // ids such as 1,2,3 in place of the prompt; prints ids, too
    'max-tokens': { type: 'string', default: '32' },
  },
});
const [folder, text = 'Once upon a time'] = positionals;
if (!folder) {
  console.error('Usage: node generate.js FOLDER [PROMPT] [--tokens 1,2,3] [--max-tokens 32]');
  process.exit(2);
}

const read = (name) => JSON.parse(readFileSync(join(folder, name), 'utf8'));
const tokenizer =
  values.tokens === undefined
    ? new Tokenizer(read('tokenizer.json'), read('tokenizer_config.json'))
    : null;
const prompt = tokenizer ? tokenizer.encode(text).ids : values.tokens.split(',').map(Number);

const session = await ort.InferenceSession.create(join(folder, 'model.onnx'), {
  // Exact sums of 8-bit products (w8a8) on x86 processors without VNNI, too.
  extra: { session: { x64quantprecision: '1' } },
});
const generated = [];
for await (const token of greedy(ort, session, read('config.json'), prompt, values['max-tokens'])) {
  generated.push(token);
}
console.log(tokenizer ? tokenizer.decode(generated) : JSON.stringify(generated));
