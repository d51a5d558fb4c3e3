"""ACPI tables as Intel's disassembler reads them."""

import re
import subprocess


def disassemble(iasl, folder, table):
    """Return what iasl makes of a table, with runs of blanks made one."""
    name = table[:4].decode()
    (folder / f"{name}.aml").write_bytes(table)
    done = subprocess.run(
        [iasl, "-d", f"{name}.aml"], cwd=folder, capture_output=True, text=True, check=True
    )
    text = (folder / f"{name}.dsl").read_text()
    for complaint in ("Incorrect checksum", "Invalid", "Could not", "Warning", "Error"):
        assert complaint not in done.stderr
        assert complaint not in text
    return re.sub(r"[ \t\n]+", " ", text)
