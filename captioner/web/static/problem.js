/** What went wrong, in words for people. */
export class Problem extends Error {
  /**
   * @param {string} message
   * @param {boolean} passing whether it may be over when one tries again
   */
  constructor(message, passing) {
    super(message);
    this.passing = passing;
  }
}
