/** The few things that every part of the page does with the document. */

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; a string is a text node, never markup. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Writes only what has changed, so that a selection in the text outlives the next second. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Gives a table these rows; a row is a list of cells, {text, className} or text, the first of them its heading. */
export function setRows(body, rows) {
  while (body.rows.length > rows.length) body.rows[body.rows.length - 1].remove();
  rows.forEach((cells, index) => setCells(body.rows[index] ?? body.insertRow(), cells));
}

function setCells(row, cells) {
  while (row.cells.length < cells.length) {
    row.append(row.cells.length ? make("td") : make("th", { scope: "row" }));
  }
  cells.forEach((cell, index) => {
    const { text, className = "", title = "" } = typeof cell === "object" ? cell : { text: cell };
    const element = row.cells[index];
    setText(element, text);
    if (element.className !== className) element.className = className;
    if (element.title !== title) element.title = title;
  });
}
