"""From what was written down to classes of atoms that go together, and which axes shrink."""
