"use strict";
// A small, safe part of Markdown as elements: nothing that a model writes is ever parsed as HTML.
const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

const inline = (text) => {
  const parts = text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*|(?<![\w*])\*[^*\s][^*\n]*\*(?![\w*]))/);
  return parts.filter(Boolean).map((part, index) => {
    if (index % 2 === 0 && !/^[`*]/.test(part)) return part;
    if (/^`.+`$/.test(part)) return element("code", {}, part.slice(1, -1));
    if (/^\*\*.+\*\*$/.test(part)) return element("strong", {}, part.slice(2, -2));
    if (/^\*[^*]+\*$/.test(part)) return element("em", {}, part.slice(1, -1));
    return part;
  });
};

const block = (text) => {
  const lines = text.split("\n");
  const list = (pattern, name) =>
    lines.every((line) => pattern.test(line)) &&
    element(name, {}, ...lines.map((line) => element("li", {}, ...inline(line.replace(pattern, "")))));
  const heading = /^#{1,6} +(.*)$/.exec(text);
  if (heading && lines.length === 1) return element("h3", {}, ...inline(heading[1]));
  return list(/^ *[-*] +/, "ul") || list(/^ *\d+[.)] +/, "ol") || element("p", {}, ...inline(text));
};

const markup = (text) =>
  text.split(/(^```[^\n]*\n[\s\S]*?(?:^```[ \t]*$|$(?![\s\S])))/m).flatMap((part) => {
    const code = /^```[^\n]*\n([\s\S]*?)(?:\n?```[ \t]*)?$/.exec(part);
    if (code) return [element("pre", { tabIndex: 0 }, element("code", {}, code[1]))];
    return part.split(/\n{2,}/).filter((text) => text.trim()).map((text) => block(text.replace(/^\n+|\s+$/g, "")));
  });
