"""`python -m captioner.bulk`, the same as `caption-bulk`."""

from captioner.bulk.command import main

if __name__ == "__main__":
    raise SystemExit(main())
