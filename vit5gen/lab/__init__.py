"""What uses the package and nothing in it uses: benchmarks and studies."""
