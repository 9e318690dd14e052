/**
 * A little Markdown, as it streams in, made of text nodes only: paragraphs, headings, lists, code blocks, `code`, **strong**.
 *
 * Only the block that is being written is ever drawn again, and no block grows beyond a bound: a token costs the same at the
 * end of a long answer as at its beginning.
 */

const MAX_TEXT = 4000; // characters of one block of text; beyond, the next begins
const MAX_CODE_LINES = 64; // lines in one element of a code block

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(?=\S)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(?=\S)/;
/** The beginning of a line that may yet become any of them: it waits for its next characters. */
const UNDECIDED = /^\s*(#{0,6}|[-*+]|\d{1,9}[.)]?|`{1,2}|~{1,2})\s*$|^ {0,3}(`{3,}|~{3,})[^`]*$/;

export class MarkdownStream {
  #root;
  #onBlock;
  #waiting = ""; // the beginning of a line, not yet decided
  #inLine = false; // the line has been decided: what follows belongs to the leaf
  #leaf = null; // the element being written
  #text = ""; // of that leaf
  #lists = []; // those that are open, the innermost last
  #code = null; // {fence, element, lines, block}

  /**
   * @param {Element} root
   * @param {(text: string) => void} onBlock hears of each block once it is complete
   */
  constructor(root, onBlock = () => {}) {
    this.#root = root;
    this.#onBlock = onBlock;
  }

  append(text) {
    const lines = text.split("\n");
    lines.forEach((part, index) => {
      this.#write(part);
      if (index < lines.length - 1) this.#endLine();
    });
    this.#draw();
  }

  end() {
    if (this.#waiting) this.#startLine();
    this.#draw();
    this.#close();
  }

  #write(part) {
    if (!part) return;
    if (this.#inLine) return this.#grow(part);
    this.#waiting += part;
    const undecided = this.#code ? this.#mayCloseCode() : UNDECIDED.test(this.#waiting);
    if (!undecided) this.#startLine();
  }

  #endLine() {
    if (!this.#inLine) this.#startLine();
    if (this.#code) this.#endCodeLine();
    this.#inLine = false;
  }

  #startLine() {
    const line = this.#waiting;
    this.#waiting = "";
    this.#inLine = true;
    if (this.#code) return this.#startCodeLine(line);
    const fence = FENCE.exec(line);
    if (fence) return this.#openCode(fence[1], fence[2].trim());
    if (!line.trim()) return this.#close();
    const heading = HEADING.exec(line);
    if (heading) return this.#openHeading(heading[1].length, line.slice(heading[0].length));
    const item = ITEM.exec(line);
    if (item) return this.#openItem(item, line.slice(item[0].length));
    if (this.#leaf && this.#leaf.dataset.kind !== "heading") return this.#grow("\n" + line.trimStart());
    this.#open(this.#root, "p", "text");
    this.#grow(line);
  }

  #open(parent, tag, kind) {
    this.#finishLeaf();
    if (parent === this.#root) this.#lists = [];
    this.#leaf = parent.appendChild(document.createElement(tag));
    this.#leaf.dataset.kind = kind;
    return this.#leaf;
  }

  #openHeading(level, text) {
    const heading = this.#open(this.#root, "p", "heading");
    heading.role = "heading";
    heading.ariaLevel = String(Math.min(6, level + 3)); // below the page's own
    this.#grow(text);
  }

  #openItem([, indent, marker], text) {
    const width = indent.replaceAll("\t", "    ").length;
    const tag = /\d/.test(marker) ? "ol" : "ul";
    while (this.#lists.length && width < this.#lists.at(-1).width) this.#lists.pop();
    let inner = this.#lists.at(-1);
    if (inner && width >= inner.width + 2) {
      inner = this.#openList(inner.list.lastElementChild, tag, marker, width);
    } else if (inner?.list.localName !== tag) {
      this.#lists.pop();
      inner = this.#openList(this.#lists.at(-1)?.list.lastElementChild ?? this.#root, tag, marker, width);
    }
    this.#open(inner.list, "li", "item");
    this.#grow(text);
  }

  #openList(parent, tag, marker, width) {
    this.#finishLeaf();
    const list = parent.appendChild(document.createElement(tag));
    if (tag === "ol") list.start = parseInt(marker, 10);
    this.#lists.push({ list, width });
    return this.#lists.at(-1);
  }

  #grow(text) {
    if (this.#code) {
      this.#code.block.firstChild.appendData(text);
      return;
    }
    if (!this.#leaf) this.#open(this.#root, "p", "text");
    this.#text += text;
    while (this.#text.length > MAX_TEXT) this.#continue();
  }

  /** Ends a block that has become too long, at a space, and goes on in another that looks like the rest of it. */
  #continue() {
    const space = this.#text.lastIndexOf(" ", MAX_TEXT);
    const cut = space > MAX_TEXT / 2 ? space + 1 : MAX_TEXT;
    const rest = this.#text.slice(cut);
    this.#text = this.#text.slice(0, cut);
    const { parentNode, localName, dataset } = this.#leaf;
    this.#open(parentNode, localName, dataset.kind).classList.add("continued");
    this.#text = rest;
  }

  #draw() {
    if (this.#leaf) this.#leaf.replaceChildren(...inline(this.#text));
  }

  #finishLeaf() {
    if (this.#leaf) {
      this.#draw();
      this.#onBlock(this.#leaf.textContent);
    }
    this.#leaf = null;
    this.#text = "";
  }

  #close() {
    this.#finishLeaf();
    if (this.#code) this.#onBlock(`Code, ${Math.max(0, this.#code.lines)} lines.`);
    this.#code = null;
    this.#lists = [];
  }

  #openCode(fence, language) {
    this.#close();
    const pre = this.#root.appendChild(document.createElement("pre"));
    pre.tabIndex = 0; // it scrolls, so the keyboard must reach it
    pre.role = "region";
    pre.ariaLabel = language ? `Code, ${language}` : "Code";
    const element = pre.appendChild(document.createElement("code"));
    this.#code = { fence, element, lines: -1, block: null }; // the fence's own line ends next
  }

  #startCodeLine(line) {
    if (this.#closesCode(line)) {
      this.#close();
      return;
    }
    this.#grow(line);
  }

  #endCodeLine() {
    const code = this.#code;
    code.block?.firstChild.appendData("\n");
    code.lines += 1;
    if (code.lines % MAX_CODE_LINES === 0) {
      code.block = code.element.appendChild(document.createElement("span"));
      code.block.append("");
    }
  }

  #closesCode(line) {
    const match = /^ {0,3}(`+|~+)\s*$/.exec(line);
    return match !== null && match[1].startsWith(this.#code.fence);
  }

  #mayCloseCode() {
    return /^ {0,3}(`*|~*)\s*$/.test(this.#waiting);
  }
}

/** Text with `code` and **strong** in it, as nodes; a mark without its partner is itself. */
function inline(text) {
  const nodes = [];
  let plain = 0; // where the text since the last element began
  let at = 0;
  while ((at = nextMark(text, at)) >= 0) {
    const mark = text[at] === "*" ? "**" : /^`+/.exec(text.slice(at))[0];
    const begin = at + mark.length;
    const end = text.indexOf(mark, begin);
    const spaced = mark === "**" && (text[begin] === " " || text[end - 1] === " ");
    if (end <= begin || spaced) {
      at = begin;
      continue;
    }
    if (at > plain) nodes.push(document.createTextNode(text.slice(plain, at)));
    const element = document.createElement(mark === "**" ? "strong" : "code");
    if (mark === "**") element.append(...inline(text.slice(begin, end)));
    else element.textContent = text.slice(begin, end);
    nodes.push(element);
    at = plain = end + mark.length;
  }
  if (plain < text.length) nodes.push(document.createTextNode(text.slice(plain)));
  return nodes;
}

function nextMark(text, from) {
  const code = text.indexOf("`", from);
  const strong = text.indexOf("**", from);
  return code < 0 || (strong >= 0 && strong < code) ? strong : code;
}
