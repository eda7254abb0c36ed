/** The page with the server's captions. */

import { showPage } from "./page.js";
import { server } from "./server.js";

showPage(server);
