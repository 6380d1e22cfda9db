// The page: opens a bundle when asked to, and shows each token as it comes.
import { openUrl } from './web.mjs';

const form = document.querySelector('form');
const output = document.querySelector('output');
const open = new Map();

form.addEventListener('submit', async (event) => {
  event.preventDefault();
  const { bundle, prompt, count } = Object.fromEntries(new FormData(form));
  form.button.disabled = true;
  document.body.dataset.state = 'busy';
  try {
    output.textContent = 'loading';
    if (!open.has(bundle)) open.set(bundle, await openUrl(bundle));
    const { decoder, text } = open.get(bundle);
    const tokens = [];
    for await (const { token } of decoder.generate(text.encode(prompt), Number(count))) {
      tokens.push(token);
      output.textContent = text.decode(tokens);
    }
    document.body.dataset.state = 'done';
  } catch (error) {
    output.textContent = error.message;
    document.body.dataset.state = 'failed';
  }
  form.button.disabled = false;
});
