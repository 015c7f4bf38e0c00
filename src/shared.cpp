// CMake needs a source for a library that is linked from an archive alone.
