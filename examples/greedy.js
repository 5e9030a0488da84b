// The decoding loop, the same for onnxruntime-node and onnxruntime-web.

/**
 * Yield the ids that follow `prompt` (an array of token ids), greedily and one by one.
 *
 * @param ort onnxruntime-node or onnxruntime-web, of which `session` is one
 * @param config the export's config.json
 */
export async function* greedy(ort, session, config, prompt, maxTokens) {
  const ends = [config.eos_token_id ?? []].flat();
  const integers = (values, shape) =>
    new ort.Tensor('int64', BigInt64Array.from(values, BigInt), shape);
  let pasts = emptyCache(ort, session, config);
  let ids = prompt;
  for (let count = 0; count < maxTokens; count++) {
    // As long as the ids in the first call, where the graph puts the prefix into the cache itself.
    const length = prompt.length + count;
    const outputs = await session.run({
      input_ids: integers(ids, [1, ids.length]),
      attention_mask: integers(Array(length).fill(1), [1, length]),
      ...pasts,
    });
    for (const name in pasts) {
      pasts[name].dispose(); // on a GPU it is memory that no garbage collector sees
      pasts[name] = outputs[name.replace('past_key_values', 'present')];
    }
    const token = largest(outputs.logits.data);
    yield token;
    if (ends.includes(token)) break;
    ids = [token];
  }
  for (const past of Object.values(pasts)) past.dispose();
}

function emptyCache(ort, session, config) {
  const pasts = {};
  for (const { name, type, shape } of session.inputMetadata) {
    if (!name.startsWith('past_key_values.')) continue;
    // The streams' caches are rows of the batch, unless the export has them as heads.
    const rows = shape[0] === 'batch_size_times_streams' ? config.parscale_n : 1;
    const nothing = type === 'float16' ? new Uint16Array(0) : new Float32Array(0);
    pasts[name] = new ort.Tensor(type, nothing, [rows, shape[1], 0, shape[3]]);
  }
  return pasts;
}

function largest(logits) {
  return logits.reduce((best, value, token) => (value > logits[best] ? token : best), 0);
}
