"""SPICE (Anderson et al. 2016, arXiv 1607.08822), by its authors' program, which needs a Java.

It reads captions into objects, attributes and relations, and scores those that a caption shares with its
references. The extra `meteor` brings the program with pycocoevalcap, but not Stanford CoreNLP, which it parses
captions with; pycocoevalcap fetches that (400 MB) with `python -m pycocoevalcap.spice.get_stanford_models`.
"""

import json
import math
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from evaluation.java import UnavailableError, find_program

_PARSER = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class Spice:
    """The program, which is started anew for each set of captions: it knows no other way."""

    def __init__(self) -> None:
        """Find the program, its parser and a Java.

        Raises:
            UnavailableError: when one of them is missing.
        """
        self._java, self._jar = find_program("spice", "spice-1.0.jar")
        library = self._jar.parent / "lib"
        if not all((library / name).exists() for name in _PARSER):
            raise UnavailableError(
                "Stanford CoreNLP is not there; fetch it (400 MB) with: "
                "python -m pycocoevalcap.spice.get_stanford_models"
            )

    def score(self, captions: Iterable[tuple[Sequence[str], Sequence[Sequence[str]]]]) -> list[float]:
        """Return the F-score of each tokenized caption with its references; 0 where there is nothing to share.

        Raises:
            UnavailableError: when the program does not run.
        """
        pictures = [
            {"image_id": number, "test": " ".join(words), "refs": [" ".join(each) for each in references]}
            for number, (words, references) in enumerate(captions)
        ]
        with tempfile.TemporaryDirectory(prefix="spice-") as folder:
            asked, answered = Path(folder, "captions.json"), Path(folder, "scores.json")
            asked.write_text(json.dumps(pictures), encoding="utf-8")
            command = [self._java, "-Xmx8G", "-jar", str(self._jar), str(asked), "-out", str(answered)]
            done = subprocess.run(
                [*command, "-subset", "-silent"], cwd=self._jar.parent, capture_output=True, text=True, check=False
            )
            try:
                scores = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(answered.read_text())}
                found = [float(scores[number] or 0.0) for number in range(len(pictures))]
            except (OSError, ValueError, KeyError, TypeError) as error:
                last = (done.stderr.strip().splitlines() or [repr(error)])[-1]
                raise UnavailableError(
                    f"java ended with status {done.returncode} ({last}); does it have 8 GB of memory?"
                ) from error
        return [value if math.isfinite(value) else 0.0 for value in found]
