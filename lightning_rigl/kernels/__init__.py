"""The package's C++: products, selections and steps over active connections only, and how it gets loaded."""
