/** Follows a growing text for as long as the reader is at its end, and leaves them alone once they have scrolled away. */

const NEAR_PX = 48;

export class Follower {
  #box;
  #button;
  #follows = true;
  #top = 0;

  constructor(box, button) {
    this.#box = box;
    this.#button = button;
    box.addEventListener("scroll", () => this.#look(), { passive: true });
    button.addEventListener("click", () => {
      this.toEnd();
      box.focus();
    });
  }

  /** Makes a change to the text, and stays at the end if the reader was there. */
  draw(change) {
    change();
    if (this.#follows) this.toEnd();
    else this.#button.hidden = false;
  }

  toEnd() {
    this.#follows = true;
    this.#button.hidden = true;
    this.#box.scrollTop = this.#box.scrollHeight;
  }

  /** Only a reader scrolls upwards; that the end has moved on meanwhile says nothing of them. */
  #look() {
    const { scrollHeight, scrollTop, clientHeight } = this.#box;
    if (scrollHeight - scrollTop - clientHeight < NEAR_PX) this.#follows = true;
    else if (scrollTop < this.#top) this.#follows = false;
    this.#top = scrollTop;
    if (this.#follows) this.#button.hidden = true;
  }
}
