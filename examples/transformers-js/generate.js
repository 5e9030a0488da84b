// Generate greedily with transformers.js from an export made with --target web.
import { resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { AutoModelForCausalLM, Tensor, env, pipeline } from '@huggingface/transformers';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    tokens: { type: 'string' }, // ids such as 1,2,3 in place of the prompt; prints ids, too
    chat: { type: 'boolean', default: false }, // take the prompt as a message to answer
    'max-tokens': { type: 'string', default: '32' },
  },
});
const [given, prompt = 'Once upon a time'] = positionals;
if (!given) {
  console.error('Usage: node generate.js FOLDER [PROMPT] [--chat] [--tokens 1,2,3] [--max-tokens 32]');
  process.exit(2);
}
const folder = resolve(given); // a relative path would be taken for a name on the hub
env.allowRemoteModels = false;
const options = { max_new_tokens: Number(values['max-tokens']), do_sample: false };
// Exact sums of 8-bit products (w8a8) on x86 processors without VNNI, too.
const exact = { session_options: { extra: { session: { x64quantprecision: '1' } } } };

if (values.tokens === undefined) {
  const generator = await pipeline('text-generation', folder, exact);
  const input = values.chat ? [{ role: 'user', content: prompt }] : prompt;
  const [answer] = await generator(input, { ...options, return_full_text: false });
  console.log(values.chat ? answer.generated_text.at(-1).content : answer.generated_text);
} else {
  const ids = values.tokens.split(',').map(BigInt);
  const model = await AutoModelForCausalLM.from_pretrained(folder, exact);
  const shape = [1, ids.length];
  const sequence = await model.generate({
    inputs: new Tensor('int64', ids, shape),
    attention_mask: new Tensor('int64', ids.map(() => 1n), shape),
    ...options,
  });
  console.log(JSON.stringify(sequence.tolist()[0].slice(ids.length).map(Number)));
}
