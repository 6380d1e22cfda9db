// Every greedy token behind a prompt with the logits that chose it, in Node and in the page alike.

/** `{tokens, logits}` of `count` steps for each of `prompts`, as plain arrays. */
export async function trace({ decoder }, prompts, count) {
  const traces = [];
  for (const ids of prompts) {
    const steps = [];
    for await (const step of decoder.generate(ids, count, { stopAtEos: false })) steps.push(step);
    traces.push({ tokens: steps.map(({ token }) => token), logits: steps.map(({ logits }) => [...logits]) });
  }
  return traces;
}
