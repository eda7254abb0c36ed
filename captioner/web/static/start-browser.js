/** The page with captions that this browser computes. */

import { browser } from "./browser.js";
import { showPage } from "./page.js";

showPage(browser);
