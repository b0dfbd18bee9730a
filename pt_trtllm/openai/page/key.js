// The API key, where the server wants one: asked for when it is missed, and kept until the tab is closed.
const KEY = "pt-trtllm-api-key", WRONG = 401;
const by = (id) => document.getElementById(id);

/** `fetch` from this server, with the key; brings up the question for it where that is not enough. */
const askServer = async (url, options = {}) => {
  const key = sessionStorage.getItem(KEY);
  by("all_metrics").hidden = Boolean(key); // a link cannot carry it
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(url, { ...options, headers });
  const isLatest = key === sessionStorage.getItem(KEY);
  if (response.status === WRONG && isLatest && by("unlock").hidden) {
    by("unlock").hidden = false;
    by("unlock_failure").hidden = !key;
    by("unlock_failure").textContent = "The server does not know this key.";
    by("api_key").focus();
  }
  return response;
};

const onUnlock = (action) => by("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, by("api_key").value.trim());
  by("api_key").value = "";
  by("unlock").hidden = true;
  action();
});
