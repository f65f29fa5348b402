"""Slurm arrays that do one thing to many items: conversion, verification, segmentation."""
