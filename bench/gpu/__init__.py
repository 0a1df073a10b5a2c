"""The parts of a GPU session that are Python, each a command of its own: see ``bench/README.md``.

``python -m bench.gpu.NAME --out FILE`` appends a row to FILE as soon as it is measured, so that a
part that is stopped leaves what it has found. ``--dry-run`` takes tiny matrices on the CPU.
"""
