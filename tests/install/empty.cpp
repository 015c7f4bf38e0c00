// A library that is linked from an archive alone still needs a source.
