/*
 * version.h - what --version and GetStatus say; CMake's project version.
 */
#ifndef FV_COORD_VERSION_H
#define FV_COORD_VERSION_H

#ifndef FV_VERSION
#    define FV_VERSION "unversioned"
#endif

#endif /* FV_COORD_VERSION_H */
