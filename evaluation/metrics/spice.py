"""SPICE (Anderson et al. 2016, arXiv 1607.08822), by its authors' Java program.

It parses captions into objects, attributes and relations, and scores those that a caption shares with its
references. The program is part of pycocoevalcap (extra `meteor`). Its parser, Stanford CoreNLP (400 MB), is not:
download it with `python -m pycocoevalcap.spice.get_stanford_models`.
"""

import json
import math
import subprocess
import tempfile
from pathlib import Path

from evaluation.metrics.base import Captions, MeanMetric
from evaluation.metrics.java import UnavailableError, find_program

_PARSER = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class Spice(MeanMetric):
    """The F-score of SPICE, 0..1."""

    names = ("SPICE",)
    needs_java = True

    def values(self, captions: Captions) -> list[float]:
        """Return the F-score of each image; 0 if a caption has nothing to compare.

        Raises:
            UnavailableError: if Java, the program or its parser is missing, or the program fails.
        """
        java, jar = find_program("spice", "spice-1.0.jar")
        if not all((jar.parent / "lib" / name).exists() for name in _PARSER):
            raise UnavailableError(
                "Stanford CoreNLP is missing; download it (400 MB) with: "
                "python -m pycocoevalcap.spice.get_stanford_models"
            )
        pairs = zip(captions.words, captions.references.words, strict=True)
        rows = [
            {"image_id": index, "test": " ".join(words), "refs": [" ".join(reference) for reference in references]}
            for index, (words, references) in enumerate(pairs)
        ]
        with tempfile.TemporaryDirectory(prefix="spice-") as folder:
            source, target = Path(folder, "captions.json"), Path(folder, "scores.json")
            source.write_text(json.dumps(rows), encoding="utf-8")
            command = [java, "-Xmx8G", "-jar", str(jar), str(source), "-out", str(target), "-subset", "-silent"]
            process = subprocess.run(command, cwd=jar.parent, capture_output=True, text=True, check=False)
            try:
                scores = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(target.read_text())}
                found = [float(scores[index] or 0.0) for index in range(len(rows))]
            except (OSError, ValueError, KeyError, TypeError) as error:
                last = (process.stderr.strip().splitlines() or [repr(error)])[-1]
                raise UnavailableError(
                    f"java exited with status {process.returncode} ({last}); it needs 8 GB of memory"
                ) from error
        return [value if math.isfinite(value) else 0.0 for value in found]
