"""What several tests need: worlds to test in, and looks at the source tree."""
